import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from monai_deqkan.transforms import CheckSameShaped, LoadMask, LoadMedicalImage, SaveMask, SaveMaskd

RNG = np.random.default_rng(0)


def picture(path, height=7, width=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (height, width), dtype=np.uint8)).save(path)
    return path


def classes_like(image, count):
    pixels = torch.from_numpy(RNG.integers(0, count, tuple(image.shape))).float()
    return MetaTensor(pixels, meta=dict(image.meta))


@pytest.mark.parametrize(("values", "dtype"), [([0, 255], np.uint8), ([0, 128, 300], np.uint16)])
def test_picture_keeps_size_orientation_and_values(tmp_path, values, dtype):
    file = picture(tmp_path / "in" / "a" / "b" / "x.png")
    mask = classes_like(LoadMedicalImage(channels=1)(file), len(values))
    SaveMask(values, tmp_path / "out", tmp_path / "in")(mask)
    stored = np.asarray(Image.open(tmp_path / "out" / "a" / "b" / "x_mask.png"))
    assert stored.shape == (7, 5)
    assert stored.dtype == dtype
    # An image's rows are the picture's rows: MONAI's readers swap the two.
    assert np.array_equal(stored, np.asarray(values)[mask[0].numpy().astype(int).T])


def test_written_masks_are_read_back_as_the_same_classes(tmp_path):
    mask = classes_like(LoadMedicalImage(channels=1)(picture(tmp_path / "x.jpg")), 3)
    SaveMask([0, 85, 170], tmp_path / "out", tmp_path)(mask)
    again = LoadMask([0, 85, 170])(tmp_path / "out" / "x_mask.png")
    assert torch.equal(again.as_tensor(), mask.as_tensor().long())


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii"])
def test_nifti_keeps_the_affine(tmp_path, name, spatial_dims):
    affine = np.array([[-0.7, 0.1, 0, 5], [0.1, 0.8, 0, -3], [0, 0, 2.5, 2], [0, 0, 0, 1.0]])
    shape = (6, 5, 4)[:spatial_dims]
    nib.save(nib.Nifti1Image(RNG.random(shape).astype(np.float32), affine), tmp_path / name)
    mask = classes_like(LoadMedicalImage(channels=1, spatial_dims=spatial_dims)(tmp_path / name), 2)
    SaveMask([-1, 7], tmp_path / "out", tmp_path)(mask)
    stored = nib.load(tmp_path / "out" / "scan_mask.nii.gz")
    assert np.allclose(stored.affine, affine)
    assert np.issubdtype(stored.get_data_dtype(), np.integer)
    assert np.array_equal(np.asarray(stored.dataobj), np.array([-1, 7])[mask[0].numpy().astype(int)])


def test_values_that_no_png_can_hold_go_to_nifti(tmp_path):
    mask = classes_like(LoadMedicalImage(channels=1)(picture(tmp_path / "x.png")), 2)
    SaveMask([0, 70000], tmp_path / "out", tmp_path)(mask)
    assert set(np.unique(nib.load(tmp_path / "out" / "x_mask.nii.gz").get_fdata())) == {0, 70000}


def test_image_from_elsewhere_is_written_at_the_top(tmp_path):
    mask = classes_like(LoadMedicalImage(channels=1)(picture(tmp_path / "elsewhere" / "x.png")), 2)
    SaveMask([0, 1], tmp_path / "out", tmp_path / "in")(mask)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x_mask.png"]


def test_existing_file_is_refused_and_left_alone(tmp_path):
    mask = classes_like(LoadMedicalImage(channels=1)(picture(tmp_path / "x.png")), 2)
    save = SaveMaskd("pred", [0, 1], tmp_path / "out", tmp_path)
    save({"pred": mask})
    before = (tmp_path / "out" / "x_mask.png").read_bytes()
    with pytest.raises(FileExistsError, match=r"The mask is there already: .*x_mask\.png"):
        save({"pred": 1 - mask})
    assert (tmp_path / "out" / "x_mask.png").read_bytes() == before


def test_wrong_masks_are_refused(tmp_path):
    image = LoadMedicalImage(channels=1)(picture(tmp_path / "x.png"))
    save = SaveMask([0, 255], tmp_path / "out", tmp_path)
    with pytest.raises(ValueError, match=r"Class indices must lie in \[0, 2\); got up to 2"):
        save(MetaTensor(torch.full((1, 5, 7), 2.0), meta=dict(image.meta)))
    with pytest.raises(ValueError, match="Take the argmax over classes first"):
        save(MetaTensor(torch.zeros(2, 5, 7), meta=dict(image.meta)))
    assert not (tmp_path / "out").exists()


def test_sizes_of_image_and_mask_are_compared(tmp_path):
    check = CheckSameShaped(["image", "label"])
    image = LoadMedicalImage(channels=1)(picture(tmp_path / "x.png"))
    label = LoadMedicalImage(channels=1)(picture(tmp_path / "y.png", 7, 6))
    data = {"image": image, "label": image[:1] > 3}
    assert check(data) == data
    with pytest.raises(ValueError, match=r"\[\(5, 7\), \(6, 7\)\] for .*x.png.*y.png.*Resample the mask"):
        check({"image": image, "label": label})
