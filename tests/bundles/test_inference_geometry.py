"""Masks must lie where the image shows what they mark, whatever its format, size and affine.

The network is a 1x1 convolution that calls brighter than the mean foreground, so the right mask is known.
"""

import csv
import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

BUNDLE = Path(__file__).parents[2] / "bundles" / "lung_xray_kanunet_segmentation"
CONFIG = str(BUNDLE / "configs" / "inference.json")


def shape_2d(height, width):
    """Draw an L that no flip or quarter turn maps onto itself."""
    rows, columns = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    upright = (columns > 0.15) & (columns < 0.5) & (rows > 0.1) & (rows < 0.9)
    return upright | ((rows > 0.6) & (rows < 0.9) & (columns > 0.15) & (columns < 0.85))


def shape_3d(size):
    x, y, z = (axis / length for axis, length in zip(np.indices(size), size, strict=True))
    return ((x > 0.15) & (x < 0.55) & (y > 0.1) & (y < 0.9) & (z > 0.2)) | (
        (x > 0.15) & (x < 0.9) & (y > 0.5) & (z > 0.6)
    )


def dicom(path, pixels, positioned):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        DigitalXRayImageStorageForPresentation,
        generate_uid(),
    )
    file = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.PatientName, file.PatientID = "Secret^Name", "S3CRET"
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 12, 11
    file.ImagerPixelSpacing = [0.2, 0.2]
    if positioned:
        file.PixelSpacing, file.SliceThickness = [0.5, 0.75], 3.0
        file.ImageOrientationPatient, file.ImagePositionPatient = [0, 1, 0, 0, 0, -1], [10.0, 20.0, 30.0]
    file.PixelData = pixels.astype(np.uint16).tobytes()
    file.save_as(path, enforce_file_format=True)


def infer(tmp_path, spatial_dims, preprocessing, **override):
    models = tmp_path / "models"
    models.mkdir()
    task = {
        "class_names": ["background", "part one/two"],
        "mask_values": [0, 7],
        "preprocessing": {"in_channels": 1, "spatial_dims": spatial_dims, "image_size": [128, 128], **preprocessing},
        "network_name": "KANUNet",
        "network_settings": {"features": [2]},
        "training_ranges": {"contrast": [0.0, 1.0], "resolution": [0.99, 1.1]},
    }
    (models / "model.json").write_text(json.dumps(task))
    kind = "Conv2d" if spatial_dims == 2 else "Conv3d"
    network = getattr(torch.nn, kind)(1, 2, 1)
    torch.nn.init.zeros_(network.bias)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([-5.0, 5.0]).reshape(network.weight.shape))
    torch.save(network.state_dict(), models / "model.pt")
    settings = {
        "device": "cpu",
        "progress": False,
        "bundle_root": str(tmp_path),
        "dataset_dir": str(tmp_path / "in"),
        "ckpt_dir": str(models),
        "output_dir": str(tmp_path / "out"),
        "network_def": {"_target_": f"torch.nn.{kind}", "in_channels": 1, "out_channels": 2, "kernel_size": 1},
        **override,
    }
    workflow = ConfigWorkflow(CONFIG, logging_file=False, workflow_type="infer", **settings)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return tmp_path / "out"


def overlap(mask, truth):
    assert mask.shape == truth.shape
    return 2 * np.sum((mask > 0) & truth) / (np.sum(mask > 0) + truth.sum())


def test_pictures_dicom_and_nifti_of_other_sizes(tmp_path, caplog):
    source = tmp_path / "in" / "sub"
    source.mkdir(parents=True)
    truths = {"tall": shape_2d(301, 217), "a": shape_2d(150, 333), "small": shape_2d(41, 39)}
    Image.fromarray(np.uint8(30 + 200 * truths["tall"])).save(source / "tall.png")
    Image.fromarray(np.uint8(30 + 200 * truths["small"])).convert("RGB").save(source / "small.jpg", quality=95)
    speck = np.uint8(30 + 200 * truths["a"])
    speck[5:15, 300:310] = 230
    Image.fromarray(speck).save(source / "a.png")
    dicom(source / "a.dcm", 100 + 3000 * truths["a"], positioned=False)
    dicom(source / "slice.dcm", 100 + 3000 * truths["a"], positioned=True)
    affine = np.array([[0, -0.7, 0, 5], [0.8, 0, 0, -3], [0, 0, 2.0, 2], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(truths["tall"].T.astype(np.float32), affine), source / "flat.nii.gz")
    (source / "broken.png").write_bytes((source / "a.png").read_bytes()[:80])
    with caplog.at_level(logging.WARNING):
        out = infer(tmp_path, 2, {}, keep_largest=1, save_probability=True, save_overlay=True)
    files = {path.name for path in (out / "sub").iterdir()}
    masks = {"a_mask.png", "a.png_mask.png", "tall_mask.png", "small_mask.png", "slice_mask.nii.gz", "flat_mask.nii.gz"}
    assert {name for name in files if "mask" in name} == masks
    for name, truth in (("a_mask", "a"), ("a.png_mask", "a"), ("tall_mask", "tall"), ("small_mask", "small")):
        pixels = np.asarray(Image.open(out / "sub" / f"{name}.png"))
        assert set(np.unique(pixels)) == {0, 7}
        assert overlap(pixels, truths[truth]) > 0.97
    assert not np.asarray(Image.open(out / "sub" / "a.png_mask.png"))[:20, 290:].any()  # the speck
    for name, truth in (("flat", truths["tall"].T), ("slice", truths["a"].T)):
        mask = nib.load(out / "sub" / f"{name}_mask.nii.gz")
        assert overlap(np.asarray(mask.dataobj)[..., 0] if mask.ndim == 3 else np.asarray(mask.dataobj), truth) > 0.97
        probability = np.squeeze(nib.load(out / "sub" / f"{name}_probability.nii.gz").get_fdata())
        assert np.allclose(probability.sum(-1), 1, atol=1e-5)
    assert np.allclose(nib.load(out / "sub" / "flat_mask.nii.gz").affine, affine)
    # Columns run towards the back of the patient, +y in DICOM's LPS and -y in RAS; rows towards the feet.
    wanted = [[0, 0, 3.0, -10], [-0.75, 0, 0, -20], [0, -0.5, 0, 30], [0, 0, 0, 1]]
    found = nib.load(out / "sub" / "slice_mask.nii.gz").affine
    assert np.allclose(found[:, [0, 1, 3]], np.array(wanted)[:, [0, 1, 3]])
    chance = np.asarray(Image.open(out / "sub" / "tall_probability_part-one-two.png")) / 65535
    assert np.array_equal(chance > 0.5, np.asarray(Image.open(out / "sub" / "tall_mask.png")) > 0)
    overlay = np.asarray(Image.open(out / "overlays" / "sub" / "a.dcm_overlay.png"))
    assert overlay.shape == (150, 333, 3)
    colored = (overlay != overlay[..., :1]).any(-1)
    assert 0 < colored.sum() < 0.1 * colored.size
    assert not colored[~(np.asarray(Image.open(out / "sub" / "a_mask.png")) > 0)].any()

    with (out / "masks.csv").open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert rows["sub/a.dcm"]["mask"] == "sub/a_mask.png"
    assert rows["sub/a.png"]["mask"] == "sub/a.png_mask.png"
    assert float(rows["sub/tall.png"]["share_part one/two"]) == pytest.approx(truths["tall"].mean(), abs=0.02)
    assert [name for name, row in rows.items() if row["unlike_training"]] == ["sub/small.jpg"]
    record = json.loads((out / "masks.json").read_text())
    assert [entry["file"] for entry in record["skipped"]] == ["sub/broken.png"]
    assert "not for clinical use" in record["notice"]
    assert sum("broken.png" in message for message in caplog.messages) == 1
    assert sum("1 of 6 images are unlike the training images" in message for message in caplog.messages) == 1
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert b"secret" not in written.lower() + caplog.text.lower().encode()


def turn(degrees):
    a, b = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[a, -b, 0], [b, a, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, a, -b], [0, b, a]])


@pytest.mark.parametrize("pixdim", [None, [2.0, 2.0, 2.0]])
def test_volumes_with_flipped_and_oblique_affines(tmp_path, pixdim):
    source = tmp_path / "in"
    source.mkdir()
    spacing = np.diag([1.5, 1.7, 2.6])
    linear = {
        "plain": spacing,
        "flipped": np.diag([-1.0, -1.0, 1.0]) @ spacing,
        "permuted": np.eye(3)[[2, 0, 1]] @ spacing,
        "oblique": turn(17) @ np.diag([-1.0, 1.0, 1.0]) @ spacing,
    }
    size, truth = (45, 37, 29), shape_3d((45, 37, 29))
    for name, matrix in linear.items():
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = matrix, (-30, 12, 7)
        pixels = (100 + 50 * truth).astype(np.int16)
        nib.save(nib.Nifti1Image(pixels, affine), source / f"{name}.nii.gz")
    out = infer(tmp_path, 3, {"patch_size": [16, 16, 16], "pixdim": pixdim}, save_overlay=True, save_probability=True)
    with (out / "masks.csv").open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    for name in linear:
        original, mask = nib.load(source / f"{name}.nii.gz"), nib.load(out / f"{name}_mask.nii.gz")
        assert mask.shape == size
        assert np.allclose(mask.affine, original.affine, atol=1e-5)
        assert np.allclose(mask.header.get_zooms(), original.header.get_zooms(), atol=1e-5)
        found = np.asarray(mask.dataobj)
        if pixdim is None:
            assert np.array_equal(found > 0, truth)
        else:
            assert overlap(found, truth) > 0.93
        assert float(rows[f"{name}.nii.gz"]["ml_part one/two"]) == pytest.approx(
            (found > 0).sum() * 1.5 * 1.7 * 2.6 / 1000, rel=1e-4
        )
        assert nib.load(out / f"{name}_probability.nii.gz").shape == (*size, 2)
        assert (out / "overlays" / f"{name}.nii.gz_overlay.png").is_file()
