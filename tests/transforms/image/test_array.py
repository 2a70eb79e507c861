import warnings
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImage
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from monai_deqkan.transforms.image import (
    LoadMask,
    LoadMaskd,
    LoadMedicalImage,
    LoadMedicalImaged,
    SaveMask,
    SaveProbability,
)

PATIENT = "Doe^Jane"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def write_dicom(path: Path, pixels: np.ndarray, **tags: Any) -> Path:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["fixed"])
    data.PatientName, data.PatientID, data.PatientBirthDate = PATIENT, "4711", "19700101"
    data.Rows, data.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, int(pixels.dtype.kind == "i")
    data.PixelData = pixels.astype("<i2" if pixels.dtype.kind == "i" else "<u2").tobytes()
    for tag, value in tags.items():
        setattr(data, tag, value)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


@pytest.mark.parametrize(("dtype", "high"), [(np.uint8, 256), (np.uint16, 65536)])
def test_png_is_read_x_first_and_unscaled(
    tmp_path: Path, rng: np.random.Generator, dtype: type[np.generic], high: int
) -> None:
    pixels = rng.integers(0, high, (5, 7)).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = LoadMedicalImage()(tmp_path / "a.png")
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image.numpy()[0], pixels.T)
    assert image.meta["filename_or_obj"] == str(tmp_path / "a.png")


def test_png_comes_back_the_same_through_save_image(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (9, 12), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    save = SaveImage(tmp_path / "out", "", ".png", separate_folder=False, output_dtype=np.uint8, print_log=False)
    save(LoadMedicalImage()(tmp_path / "a.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")), pixels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_color_is_turned_to_luminance_or_kept(tmp_path: Path, rng: np.random.Generator, mode: str) -> None:
    indexed = Image.fromarray(rng.integers(0, 256, (6, 4, 3), np.uint8)).quantize(16)
    color = indexed.convert("RGB")
    (indexed if mode == "P" else color.convert(mode)).save(tmp_path / "a.png")
    expected = np.asarray(color, np.float64).transpose(2, 1, 0)
    np.testing.assert_allclose(LoadMedicalImage(channels=3)(tmp_path / "a.png").numpy(), expected)
    grey = 0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2]
    np.testing.assert_allclose(LoadMedicalImage()(tmp_path / "a.png").numpy()[0], grey, rtol=1e-5)


def test_grey_is_repeated_to_three_channels_without_alpha(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (4, 4, 2), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = LoadMedicalImage(channels=3)(tmp_path / "a.png").numpy()
    for channel in image:
        np.testing.assert_array_equal(channel, pixels[..., 0].T)


def test_nifti_keeps_affine_and_comes_back_through_save_image(tmp_path: Path, rng: np.random.Generator) -> None:
    affine = np.array([[0, -1.5, 0, 3], [2.0, 0, 0, -4], [0, 0, 0.7, 5], [0, 0, 0, 1]])
    pixels = rng.normal(size=(4, 5, 6)).astype(np.float32)
    header = nib.Nifti1Header()
    header["descrip"] = PATIENT
    nib.save(nib.Nifti1Image(pixels, affine, header), tmp_path / "a.nii.gz")
    image = LoadMedicalImage(spatial_dims=3)(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(image.affine, affine, atol=1e-6)
    np.testing.assert_allclose(image.pixdim, [2.0, 1.5, 0.7], atol=1e-6)
    np.testing.assert_array_equal(image.numpy()[0], pixels)
    assert PATIENT not in repr(image.meta)
    SaveImage(tmp_path / "out", "", separate_folder=False, print_log=False)(image)
    again = nib.load(tmp_path / "out" / "a.nii.gz")
    np.testing.assert_allclose(again.affine, affine, atol=1e-6)
    np.testing.assert_array_equal(again.get_fdata(dtype=np.float32), pixels)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 1, 1)])
def test_flat_nifti_is_two_dimensional(tmp_path: Path, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    pixels = rng.normal(size=shape).astype(np.float32)
    nib.save(nib.Nifti1Image(pixels, np.diag([2.0, 3, 1, 1])), tmp_path / "a.nii")
    image = LoadMedicalImage()(tmp_path / "a.nii")
    np.testing.assert_array_equal(image.numpy(), pixels.reshape(1, 4, 5))
    np.testing.assert_allclose(image.affine, np.diag([2.0, 3, 1, 1]))


def test_slice_of_any_plane_is_two_dimensional_and_its_mask_has_its_shape(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    affine = np.array([[0, 2.0, 0, 5], [0, 0, 3.0, 6], [-4.0, 0, 0, 7], [0, 0, 0, 1]])
    for axis in range(3):
        pixels = rng.normal(size=np.insert((4, 5), axis, 1)).astype(np.float32)
        path = tmp_path / f"{axis}.nii.gz"
        nib.save(nib.Nifti1Image(pixels, affine), path)
        image = LoadMedicalImage()(path)
        np.testing.assert_array_equal(image.numpy()[0], pixels.squeeze(axis))
        left = [column for column in range(3) if column != axis]
        np.testing.assert_array_equal(image.affine[:, :2], affine[:, left])
        bright = MetaTensor(image.as_tensor() > 0, meta=image.meta)
        mask = SaveMask([0, 9], tmp_path / "out", tmp_path)(bright)
        written = nib.load(mask.meta["mask_file"])
        np.testing.assert_array_equal(np.asarray(written.dataobj), 9 * (pixels > 0))
        np.testing.assert_array_equal(written.affine, affine)
        chances = MetaTensor(torch.cat((~bright, bright)).float(), meta=image.meta)
        SaveProbability(["none", "bright"], tmp_path / "out", tmp_path)(chances)
        written = nib.load(tmp_path / "out" / f"{axis}_probability.nii.gz")
        np.testing.assert_array_equal(np.asarray(written.dataobj)[..., 1], pixels > 0)
        np.testing.assert_array_equal(written.affine, affine)


def test_nifti_channels_come_last_in_the_file(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.normal(size=(3, 4, 5, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(pixels, np.eye(4)), tmp_path / "a.nii")
    image = LoadMedicalImage(spatial_dims=3, channels=2)(tmp_path / "a.nii")
    np.testing.assert_array_equal(image.numpy(), np.moveaxis(pixels, -1, 0))


# ITK's own modules warn on their first import, and crash where that warning is an error.
@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_metaimage_and_nrrd_agree_with_itk(tmp_path: Path, rng: np.random.Generator, suffix: str) -> None:
    volume = itk.image_from_array(rng.normal(size=(3, 4, 5)).astype(np.float32))  # z, y, x
    volume.SetSpacing([0.5, 2.0, 3.0])
    volume.SetOrigin([1.0, 2.0, 3.0])
    itk.imwrite(volume, str(tmp_path / f"a{suffix}"))
    image = LoadMedicalImage(spatial_dims=3)(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(image.numpy()[0], itk.array_from_image(volume).T)
    np.testing.assert_allclose(image.affine, [[-0.5, 0, 0, -1], [0, -2, 0, -2], [0, 0, 3, 3], [0, 0, 0, 1]])


def test_dicom_is_rescaled_and_placed(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(-1000, 1000, (6, 4)).astype(np.int16)
    path = write_dicom(
        tmp_path / "a",
        pixels,
        RescaleSlope=2,
        RescaleIntercept=-10,
        PixelSpacing=[0.5, 0.8],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        ImagePositionPatient=[10, 20, 30],
        SliceThickness=3,
    )
    image = LoadMedicalImage()(path)
    np.testing.assert_array_equal(image.numpy()[0], pixels.T * 2.0 - 10)
    expected = [[-0.8, 0, 0, -10], [0, -0.5, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]]
    np.testing.assert_allclose(image.affine, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"WindowCenter": 100.5, "WindowWidth": 101}, [50, 50, 100, 150, 150]),
        ({"WindowCenter": 100, "WindowWidth": 100, "VOILUTFunction": "LINEAR_EXACT"}, [50, 50, 100, 150, 150]),
        ({"WindowCenter": [100.5, 3], "WindowWidth": [101, 3]}, [50, 50, 100, 150, 150]),
        ({"PhotometricInterpretation": "MONOCHROME1"}, [200, 180, 100, 20, 0]),
        (
            {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 100.5, "WindowWidth": 101},
            [150, 150, 100, 50, 50],
        ),
    ],
)
def test_dicom_window_and_inversion(tmp_path: Path, tags: dict[str, Any], expected: list[float]) -> None:
    path = write_dicom(tmp_path / "a.dcm", np.array([[0, 20, 100, 180, 200]], np.uint16), **tags)
    assert LoadMedicalImage()(path).numpy()[0, :, 0].tolist() == expected


def test_multi_frame_dicom_is_a_volume(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 1000, (3, 5, 4)).astype(np.uint16)
    shared, frames = Dataset(), []
    measures, plane, rescale = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, plane.ImageOrientationPatient = [0.5, 0.8], [0, 1, 0, 0, 0, -1]
    rescale.RescaleSlope, rescale.RescaleIntercept = 3, 1
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([plane])
    shared.PixelValueTransformationSequence = Sequence([rescale])
    for x in (0, 2, 4):
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = [x, 7, 8]
        frame.PlanePositionSequence = Sequence([position])
        frames.append(frame)
    path = write_dicom(
        tmp_path / "a.dcm",
        pixels,
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(frames),
    )
    image = LoadMedicalImage(spatial_dims=3)(path)
    np.testing.assert_array_equal(image.numpy()[0], pixels.transpose(2, 1, 0) * 3.0 + 1)
    expected = [[0, 0, -2, 0], [-0.8, 0, 0, -7], [0, -0.5, 0, 8], [0, 0, 0, 1]]
    np.testing.assert_allclose(image.affine, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"2 spatial dimensions; .*a\.dcm has 3, shape \(4, 5, 3\)"):
        LoadMedicalImage()(path)


def test_nothing_about_the_patient_is_kept_or_told(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint16), WindowCenter=1, WindowWidth=2)
    text = repr(LoadMedicalImage()(path).meta)
    assert not any(secret in text for secret in (PATIENT, "4711", "1970"))
    path.write_bytes(path.read_bytes()[:-8])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=r"a\.dcm cannot be read \(\w+\)") as caught_error:
            LoadMedicalImage()(path)
    assert not caught
    assert PATIENT not in str(caught_error.value)
    assert caught_error.value.__suppress_context__


def test_constant_image_is_allowed(tmp_path: Path) -> None:
    Image.new("L", (3, 3), 7).save(tmp_path / "a.png")
    assert bool((LoadMedicalImage()(tmp_path / "a.png") == 7).all())


def test_bad_files_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    load = LoadMedicalImage()
    with pytest.raises(FileNotFoundError, match=r"no image file .*none\.png"):
        load(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-2000])
    nib.save(nib.Nifti1Image(rng.normal(size=(32, 32)), np.eye(4)), tmp_path / "cut.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "cut.nii.gz").read_bytes()[:-2000])
    (tmp_path / "text.mha").write_text("not an image")
    for name in ("text.png", "cut.png", "cut.nii.gz", "text.mha"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load(tmp_path / name)
    nib.save(nib.Nifti1Image(np.array([[0, np.nan]]), np.eye(4)), tmp_path / "nan.nii")
    with pytest.raises(ValueError, match=r"nan\.nii must be finite"):
        load(tmp_path / "nan.nii")
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"2 channel.*rgb\.png has 3"):
        LoadMedicalImage(channels=2)(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"3 spatial dimensions; .*rgb\.png has 2"):
        LoadMedicalImage(spatial_dims=3, channels=3)(tmp_path / "rgb.png")
    pages = [Image.new("L", (3, 3)) for _ in range(2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"pages\.tif cannot be read .*2 pages"):
        load(tmp_path / "pages.tif")


@pytest.mark.parametrize("kind", ["grey", "rgb", "grey palette", "nifti"])
def test_mask_values_become_class_indices(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    classes = rng.integers(0, 3, (5, 6))
    values = np.array([0, 85, 255], np.uint8)[classes]
    path = tmp_path / ("a.nii" if kind == "nifti" else "a.png")
    if kind == "nifti":
        nib.save(nib.Nifti1Image(values.T.astype(np.float32), np.diag([2.0, 2, 1, 1])), path)
    else:
        picture = Image.fromarray(np.stack([values] * 3, -1) if kind == "rgb" else values)
        (picture.convert("RGB").quantize(8) if kind == "grey palette" else picture).save(path)
    mask = LoadMask([0, 85, 255])(path)
    assert mask.dtype == torch.int64
    np.testing.assert_array_equal(mask.numpy()[0], classes.T)


def test_mask_with_a_coloured_palette_holds_its_indices(tmp_path: Path, rng: np.random.Generator) -> None:
    classes = rng.integers(0, 3, (5, 6)).astype(np.uint8)
    picture = Image.fromarray(classes).convert("P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(LoadMask([0, 1, 2])(tmp_path / "a.png").numpy()[0], classes.T)


def test_mask_errors_name_file_and_values(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 3, 255, 254]], np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png may hold only the values \[0, 255\]; it also holds 3, 254"):
        LoadMask([0, 255])(tmp_path / "a.png")
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"rgb\.png must have one channel, or three equal ones"):
        LoadMask([0, 255])(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match="ascending order"):
        LoadMask([255, 0])


def test_dictionary_forms_read_their_keys(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 2, (5, 6), np.uint8) * 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = {"image": tmp_path / "a.png", "label": tmp_path / "a.png", "id": 3}
    read = LoadMaskd("label", [0, 255])(LoadMedicalImaged(["image", "other"], allow_missing_keys=True)(data))
    np.testing.assert_array_equal(read["image"].numpy()[0], pixels.T)
    np.testing.assert_array_equal(read["label"].numpy()[0], pixels.T // 255)
    assert read["id"] == 3
    with pytest.raises(KeyError):
        LoadMedicalImaged(["other"])(data)
