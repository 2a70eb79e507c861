import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from monai_deqkan.data import readable_images


@pytest.fixture
def folder(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "in" / "b.png")
    Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(tmp_path / "in" / "sub" / "a.jpg")
    whole = (tmp_path / "in" / "b.png").read_bytes()
    (tmp_path / "in" / "cut.png").write_bytes(whole[: len(whole) // 2])
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "in" / "volume.nii")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def test_good_ones_are_listed_and_each_bad_one_has_one_line(folder, caplog):
    found = readable_images(folder)
    assert [item["image"] for item in found.items] == [str(folder / "b.png"), str(folder / "sub" / "a.jpg")]
    assert found.root == folder
    assert [entry["file"] for entry in found.skipped] == ["cut.png", "volume.nii"]
    assert "cannot be read" in found.skipped[0]["reason"]
    assert "must have 2 spatial dimensions" in found.skipped[1]["reason"]
    assert [message.split(":")[0] for message in caplog.messages] == ["Skipped cut.png", "Skipped volume.nii"]
    assert all("\n" not in message and str(folder) not in message for message in caplog.messages)


def test_a_single_image(folder):
    found = readable_images(folder / "sub" / "a.jpg", channels=3)
    assert (found.root, found.items) == (folder / "sub", [{"image": str(folder / "sub" / "a.jpg")}])


def test_nothing_to_read(folder):
    with pytest.raises(FileNotFoundError, match="no image and no folder of images at"):
        readable_images(folder / "nowhere")
    with pytest.raises(ValueError, match=r"None of 1 image\(s\) at .*cut.png can be read; the first: .*cannot be read"):
        readable_images(folder / "cut.png")
