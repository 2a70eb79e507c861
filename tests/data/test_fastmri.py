import logging

import h5py
import numpy as np
import pytest
import torch

from monai_deqkan.data.fastmri import find_kspace_files, kspace_items, kspace_slices, write_kspace


def kspace(slices=2, coils=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(slices, coils, 6, 5, dtype=torch.complex64, generator=generator)


def fill(folder, *names, slices=2):
    for name in names:
        write_kspace(folder / name, kspace(slices))
    return folder


def names(items):
    return [(item["kspace"].rsplit("/", 1)[-1], item["slice"]) for item in items]


def test_written_files_read_back_in_fastmri_s_layout(tmp_path):
    data = kspace()
    write_kspace(tmp_path / "new" / "a.h5", data, attrs={"acquisition": "T1"})
    with h5py.File(tmp_path / "new" / "a.h5") as file:
        np.testing.assert_array_equal(file["kspace"][:], data.numpy())
        shifted = np.fft.ifftshift(data.numpy(), axes=(-2, -1))
        images = np.fft.fftshift(np.fft.ifft2(shifted, norm="ortho"), axes=(-2, -1))
        rss = np.sqrt((np.abs(images) ** 2).sum(1))
        np.testing.assert_allclose(file["reconstruction_rss"][:], rss, rtol=1e-5)
        assert file.attrs["max"] == pytest.approx(rss.max())
        assert file.attrs["norm"] == pytest.approx(np.linalg.norm(rss))
        assert file.attrs["acquisition"] == "T1"
        assert file.attrs["patient_id"] == "unknown"


def test_writing_refuses_bad_data_and_never_overwrites(tmp_path):
    path = tmp_path / "a.h5"
    with pytest.raises(ValueError, match=r"\(slices, K, H, W\)"):
        write_kspace(path, kspace()[0])
    with pytest.raises(ValueError, match="finite"):
        write_kspace(path, kspace() * float("nan"))
    with pytest.raises(ValueError, match="reference_rss"):
        write_kspace(path, kspace(), reference_rss=np.ones((2, 5, 6)))
    write_kspace(path, kspace(), reference_rss=np.ones((2, 6, 5)))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="not touched"):
        write_kspace(path, kspace(seed=1))
    assert path.read_bytes() == before


@pytest.mark.parametrize("prefix", ["", "multicoil_", "singlecoil_"])
def test_parts_come_from_their_folders(tmp_path, prefix):
    fill(tmp_path / f"{prefix}train", "b.h5", "a.h5")
    fill(tmp_path / f"{prefix}val", "v.h5", slices=1)
    assert names(kspace_items(tmp_path, "train")) == [("a.h5", 0), ("a.h5", 1), ("b.h5", 0), ("b.h5", 1)]
    assert names(kspace_items(tmp_path, "train", slices=[1, 7])) == [("a.h5", 1), ("b.h5", 1)]
    assert names(kspace_items(tmp_path, "val")) == names(kspace_items(tmp_path, "evaluate")) == [("v.h5", 0)]
    fill(tmp_path / f"{prefix}test", "t.h5", slices=1)
    assert names(kspace_items(tmp_path, "evaluate")) == [("t.h5", 0)]


def test_without_val_files_are_held_out_and_the_log_says_so(tmp_path, caplog):
    fill(tmp_path / "train", *(f"{i}.h5" for i in range(5)))
    with caplog.at_level(logging.INFO):
        train, val = (names(kspace_items(tmp_path, part)) for part in ("train", "val"))
    assert len(train) == 8
    assert len(val) == 2
    assert not {name for name, _ in train} & {name for name, _ in val}
    assert "4 of 5 train files" in caplog.text
    assert names(kspace_items(tmp_path, "val")) == val
    assert {tuple(names(kspace_items(tmp_path, "val", seed=seed))) for seed in range(8)} != {tuple(val)}


def test_a_single_file_is_split_by_slices_and_a_single_slice_refused(tmp_path):
    fill(tmp_path / "train", "a.h5", slices=5)
    train, val = (names(kspace_items(tmp_path, part)) for part in ("train", "val"))
    assert len(val) == 1
    assert sorted(train + val) == [("a.h5", i) for i in range(5)]
    with pytest.raises(ValueError, match="one slice"):
        kspace_items(tmp_path, "train", slices=[0])


def test_unusable_files_are_left_out_and_counted(tmp_path, caplog):
    folder = fill(tmp_path / "train", "a.h5", "b.h5")
    fill(tmp_path / "val", "v.h5")
    (folder / "bad.h5").write_text("no HDF5")
    (folder / ".hidden.h5").write_text("no HDF5")
    with h5py.File(folder / "flat.h5", "w") as file:
        file["kspace"] = np.ones((4, 5), complex)
        file.attrs["patient_id"] = "secret"
    assert {name for name, _ in names(kspace_items(tmp_path, "train"))} == {"a.h5", "b.h5"}
    assert "Left out bad.h5" in caplog.text
    assert "Left out flat.h5" in caplog.text
    assert "2 of 4 files" in caplog.text
    assert "secret" not in caplog.text
    for name in ("a.h5", "b.h5"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"all 2 .* unusable.*Expected layout"):
        kspace_items(tmp_path, "train")


def test_files_without_kspace_are_left_out_of_inference(tmp_path, caplog):
    fill(tmp_path / "site", "a.h5", slices=1)
    (tmp_path / "bad.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "site" / "ours.h5", "w") as file:
        file["reconstruction"] = np.ones((1, 6, 5), np.float32)
    assert names(kspace_slices(find_kspace_files(tmp_path))) == [("a.h5", 0)]
    left_out = [line for line in caplog.messages if line.startswith("Left out")]
    assert [line.split(":")[0] for line in left_out] == ["Left out bad.h5", "Left out site/ours.h5"]
    assert "2 of 3 files" in caplog.messages[-1]
    (tmp_path / "site" / "a.h5").unlink()
    with pytest.raises(ValueError, match=r"all 2 \*\.h5 files are unusable"):
        find_kspace_files(tmp_path)


def test_undersampled_test_files_have_no_reference(tmp_path, caplog):
    fill(tmp_path / "multicoil_val", "v.h5", slices=1)
    fill(tmp_path / "multicoil_test", "t.h5", slices=1)
    with h5py.File(tmp_path / "multicoil_test" / "t.h5", "a") as file:
        file["mask"] = np.ones(5)
    with caplog.at_level(logging.INFO):
        assert names(kspace_items(tmp_path, "evaluate")) == [("v.h5", 0)]
    assert "validation part" in caplog.text
    # For inference they serve.
    assert [f.name for f in find_kspace_files(tmp_path)] == ["t.h5", "v.h5"]
    assert names(kspace_slices(find_kspace_files(tmp_path))) == [("t.h5", 0), ("v.h5", 0)]


def test_missing_and_empty_folders_say_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        kspace_items(tmp_path / "nothing", "train")
    with pytest.raises(FileNotFoundError, match="Expected layout"):
        kspace_items(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"no \*.h5 file. Expected layout"):
        kspace_items(tmp_path, "train")
    with pytest.raises(ValueError, match=r"no \*.h5 file"):
        find_kspace_files(tmp_path)
    with pytest.raises(ValueError, match="part"):
        kspace_items(tmp_path, "test")
    with pytest.raises(ValueError, match="one of the slices"):
        kspace_slices([fill(tmp_path / "x", "a.h5") / "a.h5"], slices=[9])
