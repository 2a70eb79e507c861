import json
import os

import h5py
import numpy as np
import pytest

from monai_deqkan.data import describe_kspace_files, kspace_index


def write(path, shape=(2, 3, 4, 5), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["kspace"] = np.zeros(shape, np.complex64)
        for name, value in more.items():
            file[name] = value
    return path


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "data"
    found = [write(folder / "a.h5"), write(folder / "b.h5", (4, 6, 5), mask=np.ones(5)), folder / "c.h5"]
    found[2].write_text("no HDF5")
    return found


@pytest.fixture
def opened(monkeypatch):
    """The files that were looked into."""
    names = []
    plain = kspace_index._look_into
    monkeypatch.setattr(kspace_index, "_look_into", lambda path: (names.append(path.name), plain(path))[1])
    return names


def facts(descriptions):
    return [(d.path.name, d.shape, d.undersampled, bool(d.problem)) for d in descriptions]


def test_descriptions_are_those_of_the_files_and_are_remembered(files, tmp_path, opened):
    expected = [("a.h5", (2, 3, 4, 5), False, False), ("b.h5", (4, 1, 6, 5), True, False), ("c.h5", None, False, True)]
    first = describe_kspace_files([*files, tmp_path / "data" / "missing.h5"], tmp_path / "index")
    assert facts(first[:3]) == expected
    assert "missing.h5" in first[3].problem
    assert opened == ["a.h5", "b.h5", "c.h5"]
    assert facts(describe_kspace_files(files, tmp_path / "index")) == expected
    assert len(opened) == 3
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["a.h5", "b.h5", "c.h5"]


def test_changed_files_are_looked_into_again(files, tmp_path, opened):
    describe_kspace_files(files, tmp_path / "index")
    write(files[0], (7, 3, 4, 5))
    times = files[1].stat()
    os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert describe_kspace_files(files, tmp_path / "index")[0].shape == (7, 3, 4, 5)
    assert opened[3:] == ["a.h5", "b.h5"]


def test_a_damaged_or_foreign_index_is_made_anew(files, tmp_path, opened):
    describe_kspace_files(files, tmp_path / "index")
    (index,) = (tmp_path / "index").iterdir()
    good = index.read_text()
    lacking = json.loads(good)
    lacking["files"] = {name: {"shape": [1, 1, 1, 1]} for name in lacking["files"]}
    foreign = json.dumps({"version": 0, "folder": "x", "files": {}})
    for text in (good[:40], foreign, "[]", json.dumps({**lacking, "files": 3}), json.dumps(lacking)):
        index.write_text(text)
        opened.clear()
        describe_kspace_files(files, tmp_path / "index")
        assert len(opened) == 3
        assert index.read_text() == good


def test_a_folder_that_cannot_be_written_to_is_replaced_by_a_temporary_one(files, tmp_path, opened, monkeypatch):
    monkeypatch.setattr(kspace_index.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "file").write_text("in the way")
    for _ in range(2):
        describe_kspace_files(files, tmp_path / "file" / "index")
    assert len(opened) == 3
    assert len(list((tmp_path / "temporary").rglob("kspace-*.json"))) == 1


def test_without_a_named_folder_only_many_files_are_remembered(tmp_path, opened, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    many = [write(tmp_path / "many" / f"{i:02}.h5", (1, 1, 2, 2)) for i in range(32)]
    describe_kspace_files(many[:31])
    assert not (tmp_path / "cache").exists()
    for _ in range(2):
        describe_kspace_files(many)
    assert len(opened) == 31 + 32
    assert len(list((tmp_path / "cache" / "monai-deqkan").iterdir())) == 1
