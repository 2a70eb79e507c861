from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from monai_deqkan.data import kspace_items, reconstruction_items, source_weights, write_kspace


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), 9, dtype=np.uint8)).save(path)


@pytest.fixture
def images(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/deeper/3.png", "4.png"):
        save(tmp_path / "train" / name)
    return tmp_path


def test_images_in_any_folders_and_a_held_out_part(images):
    train, val = (reconstruction_items(images, part) for part in ("train", "val"))
    assert len(train) == 4
    assert len(val) == 1
    paths = sorted(Path(item["image"]).relative_to(images / "train").as_posix() for item in train + val)
    assert paths == ["4.png", "a/1.png", "a/2.png", "b/1.png", "b/deeper/3.png"]
    assert all(item == {"image": item["source"], "source": item["source"], "slice": 0} for item in train)
    save(images / "val" / "x" / "v.png")
    assert len(reconstruction_items(images, "train")) == 5
    assert [Path(item["image"]).name for item in reconstruction_items(images, "val")] == ["v.png"]


def test_kspace_files_come_first(images):
    write_kspace(images / "val" / "v.h5", torch.ones(3, 2, 4, 4, dtype=torch.complex64))
    items = reconstruction_items(images, "val", slices="0-1")
    assert items == kspace_items(images, "val", slices="0-1")
    assert len(items) == 2


def test_weights_make_the_shares_of_the_sources(images):
    items = reconstruction_items(images, "train") + reconstruction_items(images, "val")
    counts = Counter(Path(item["image"]).parent for item in items)
    for power, size in ((0.0, lambda n: n), (0.5, lambda n: n**0.5), (1.0, lambda n: 1)):
        shares = Counter()
        for item, weight in zip(items, source_weights(items, power), strict=True):
            shares[Path(item["image"]).parent] += weight
        assert shares == pytest.approx({source: size(count) for source, count in counts.items()})
    with pytest.raises(ValueError, match="power"):
        source_weights(items, 2.0)


def test_what_is_missing_is_told(tmp_path):
    save(tmp_path / "val" / "1.png")
    with pytest.raises(FileNotFoundError, match="no train folder"):
        reconstruction_items(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="No image"):
        reconstruction_items(tmp_path, "train")
