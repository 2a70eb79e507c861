import tracemalloc

import h5py
import numpy as np
import pytest
import torch
from monai.data import DataLoader

from monai_deqkan.data import KspaceSliceDataset, collate_kspace, parse_slices, write_kspace
from monai_deqkan.operators import MRIOperator


def kspace(slices=3, coils=2, rows=6, columns=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(slices, coils, rows, columns, dtype=torch.complex64, generator=generator)


@pytest.fixture
def root(tmp_path):
    for number in range(2):
        write_kspace(tmp_path / "multicoil_train" / f"{number}.h5", kspace(seed=number))
    write_kspace(tmp_path / "multicoil_val" / "v.h5", kspace(seed=2))
    write_kspace(tmp_path / "singlecoil_val" / "s.h5", kspace(coils=1, seed=3))
    (tmp_path / "multicoil_val" / "bad.h5").write_text("no HDF5")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(None, None), ("11-13", [11, 12, 13]), (" 0 - 1, 4", [0, 1, 4]), (range(2), [0, 1]), ((7, 3), [7, 3])],
)
def test_slices_as_text_and_as_indices(given, wanted):
    assert parse_slices(given) == wanted


@pytest.mark.parametrize("bad", ["", "3-1", "1;2", "-3", "a", [1.0], [-1], [True]])
def test_other_slices_are_refused(bad):
    with pytest.raises(ValueError, match="`slices` must be indices"):
        parse_slices(bad)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_are_the_slices_of_the_part(root, num_workers):
    dataset = KspaceSliceDataset(root, "train", slices="1-9")
    loader = DataLoader(dataset, batch_size=1, num_workers=num_workers, collate_fn=collate_kspace)
    expected = [kspace(seed=number)[index] for number in range(2) for index in (1, 2)]
    found = list(loader)
    assert [int(item["slice"]) for item in found] == [1, 2, 1, 2]
    for item, truth in zip(found, expected, strict=True):
        assert torch.equal(item["kspace"][0], truth)


def test_parts_and_challenges(root, caplog):
    truth = kspace(coils=1, seed=3)
    assert torch.equal(KspaceSliceDataset(root, "val", challenge="singlecoil")[0]["kspace"], truth[0])
    assert len(KspaceSliceDataset(root, "val")) == 3
    assert "1 of 2 files" in caplog.text
    assert len(KspaceSliceDataset(root, "all")) == 12
    with pytest.raises(FileNotFoundError, match="no train folder"):
        KspaceSliceDataset(root, "train", challenge="singlecoil")
    with pytest.raises(ValueError, match="challenge"):
        KspaceSliceDataset(root, "all", challenge="multicoil")
    with pytest.raises(ValueError, match="one of the slices"):
        KspaceSliceDataset(root, "train", slices="5-9")


@pytest.mark.parametrize("name", ["multicoil_test", "multicoil_test_v2", "multicoil_test_full", "test"])
def test_official_names_of_test_folders(root, name):
    write_kspace(root / name / "t.h5", kspace(slices=1, seed=9))
    assert torch.equal(KspaceSliceDataset(root, "evaluate")[0]["kspace"], kspace(slices=1, seed=9)[0])


def test_a_volume_read_by_slices_is_never_in_memory_whole(tmp_path, monkeypatch):
    volume = kspace(slices=36, coils=8, rows=64, columns=64)
    write_kspace(tmp_path / "train" / "a.h5", volume[:1])
    write_kspace(tmp_path / "train" / "b.h5", volume)
    one = volume[0].numpy().nbytes
    reads, plain = [], h5py.Dataset.__getitem__

    def counted(dataset, key, *more):
        found = plain(dataset, key, *more)
        reads.append(np.asarray(found).nbytes)
        return found

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    dataset = KspaceSliceDataset(tmp_path, "all")
    assert reads == []
    tracemalloc.start()
    for item in dataset:
        assert item["kspace"].shape == (8, 64, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reads == [one] * 37
    assert peak < 4 * one


def test_batches_hold_one_size_or_say_what_to_do():
    items = [{"kspace": torch.zeros(2, 4, 4), "slice": i, "source": "a"} for i in range(2)]
    assert collate_kspace(items)["kspace"].shape == (2, 2, 4, 4)
    items[1]["kspace"] = torch.zeros(3, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 4, 4\), \(3, 4, 4\)\. Take batch_size 1"):
        collate_kspace(items)


def test_coils_of_zeros_change_no_image():
    items = [{"kspace": kspace(1, coils)[0], "sensitivity_maps": kspace(1, coils, seed=1)[0]} for coils in (3, 1)]
    batch = collate_kspace([items[0], [items[1]]], pad_coils=True)
    mask = torch.ones(2, 1, 1, 5)
    images = MRIOperator(mask, batch["sensitivity_maps"]).adjoint(batch["kspace"])
    for image, item in zip(images, items, strict=True):
        alone = MRIOperator(mask[:1], item["sensitivity_maps"][None]).adjoint(item["kspace"][None])
        torch.testing.assert_close(image, alone[0])
    assert batch["kspace"].shape == (2, 3, 6, 5)
    with pytest.raises(ValueError, match="number of coils"):
        collate_kspace(items)
