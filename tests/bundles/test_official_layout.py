"""fastMRI's own folders, as they come: headers, oversampled readout, sizes and coils that differ, a file cut short."""

import csv
import json
import math
from types import SimpleNamespace

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from monai_deqkan.data import write_kspace
from monai_deqkan.metrics import nmse, psnr, ssim
from monai_deqkan.operators import FourierOperator, simulate_kspace, smooth_coil_maps

BRAIN = "brain_mri_deq_reconstruction"
# Rows are the readout, oversampled twice; the names in the header must turn up nowhere.
HEADER = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><studyInformation><patientName>Secret</patientName>
</studyInformation><encoding><trajectory>cartesian</trajectory>
<encodedSpace><matrixSize><x>{rows}</x><y>{columns}</y><z>1</z></matrixSize>
<fieldOfView_mm><x>{fov_x}</x><y>{fov_y}</y><z>5.0</z></fieldOfView_mm></encodedSpace>
<reconSpace><matrixSize><x>{half}</x><y>{columns}</y><z>1</z></matrixSize>
<fieldOfView_mm><x>{fov_half}</x><y>{fov_y}</y><z>5.0</z></fieldOfView_mm></reconSpace>
<encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{center}</center>
</kspace_encoding_step_1></encodingLimits></encoding></ismrmrdHeader>"""


def write_official(path, seed, rows, columns, coils=16, undersampled=False):
    """A disc in the middle half of the rows, as the real files are, with the scanner's image as reference."""
    generator = torch.Generator().manual_seed(seed)
    y, x = np.mgrid[:rows, :columns]
    images = [((y - rows / 2) ** 2 + (x - columns / 2) ** 2 < r**2) * (1 + 0.3 * np.sin(x / 2)) for r in (7, 8, 9)]
    maps = smooth_coil_maps((rows, columns), coils, generator=generator)
    kspace = 1e-4 * simulate_kspace(torch.as_tensor(np.stack(images), dtype=torch.complex64), maps, generator=generator)
    write_kspace(path, kspace, attrs={"patient_id": "secret-id", "acquisition": "AXT2"})
    with h5py.File(path, "a") as file:
        sizes = {"rows": rows, "half": rows // 2, "columns": columns, "last": columns - 1, "center": columns // 2}
        text = HEADER.format(**sizes, fov_x=440, fov_half=220, fov_y=200)
        del file["ismrmrd_header"]
        file["ismrmrd_header"] = text
        full = file["reconstruction_rss"][:]
        del file["reconstruction_rss"]
        if undersampled:
            mask = np.arange(columns) % 3 == 0
            mask[columns // 2 - 2 : columns // 2 + 2] = True
            data = file["kspace"][:] * mask
            del file["kspace"]
            file["kspace"], file["mask"] = data, mask
            file.attrs["acceleration"] = 4
        else:
            file["reconstruction_rss"] = full[:, rows // 4 : rows // 4 + rows // 2]


@pytest.fixture
def official(make_bundle, tmp_path):
    bundle = make_bundle(BRAIN)
    root = tmp_path / "official"
    write_official(root / "multicoil_train" / "file_a.h5", 0, 48, 28)
    write_official(root / "multicoil_train" / "file_b.h5", 1, 40, 32, coils=12)
    (root / "multicoil_train" / "file_c.h5").write_bytes((root / "multicoil_train" / "file_a.h5").read_bytes()[:5000])
    write_official(root / "multicoil_val" / "file_v.h5", 2, 44, 30)
    write_official(root / "multicoil_test" / "file_t.h5", 3, 48, 28, undersampled=True)
    return SimpleNamespace(bundle=bundle, root=root)


def text_of(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_train_evaluate_and_infer(official, tmp_path, caplog):
    bundle, root, models = official.bundle, official.root, tmp_path / "models"
    settings = {"batch_size": 1, "dataset_dir": str(root), "slices": "1-2", "num_workers": 0}
    bundle.train(models, **settings, output_dir=str(tmp_path / "logs"))
    assert "Left out file_c.h5" in caplog.text
    assert "1 of 3 files" in caplog.text
    task = json.loads((models / "model.json").read_text())
    assert math.isfinite(task["key_metric"]["value"])
    assert "not for clinical use" in json.dumps(task)

    evaluation = tmp_path / "eval"
    bundle.run("evaluate", ckpt_dir=str(models), dataset_dir=str(root), output_dir=str(evaluation))
    scores = json.loads((evaluation / "metrics.json").read_text())
    with h5py.File(evaluation / "multicoil_val" / "file_v.h5") as file:
        images = file["reconstruction"][:]
    assert images.shape == (3, 44, 30)
    # The metrics are against the root sum of squares of the whole field of view, slice by slice.
    with h5py.File(root / "multicoil_val" / "file_v.h5") as file:
        coils = FourierOperator(2).adjoint(torch.as_tensor(file["kspace"][:]))
        stored = file["reconstruction_rss"][:]
    reference = coils.abs().square().sum(1).sqrt()
    np.testing.assert_allclose(reference[:, 11:33], stored, rtol=1e-4, atol=1e-9)
    own = psnr(torch.as_tensor(images)[:, None], reference[:, None]).mean()
    assert float(own) == pytest.approx(scores["val_psnr"], abs=1e-3)

    output = tmp_path / "out"
    bundle.run(
        "inference",
        ckpt_dir=str(models),
        dataset_dir=str(root / "multicoil_test"),
        output_dir=str(output),
        formats=["h5", "nifti"],
        image_size="recon",
    )
    volume = nib.load(output / "file_t.nii.gz")
    with h5py.File(output / "file_t.h5") as file:
        images = file["reconstruction"][:]
        assert "not for clinical use" in file.attrs["note"]
    assert images.shape == (3, 24, 28)
    np.testing.assert_array_equal(np.asarray(volume.dataobj), images.transpose(2, 1, 0))
    # Pixels: the field of view of k-space over its samples, whether cropped or not.
    assert volume.header.get_zooms() == pytest.approx((200 / 28, 440 / 48, 5.0))
    with (output / "slices.csv").open(newline="") as file:
        assert [row["slice"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    for folder in (models, evaluation, output, tmp_path / "logs"):
        assert b"ecret" not in text_of(folder)
    assert "ecret" not in caplog.text


def test_scores_of_the_fastmri_package_on_our_output(official, tmp_path):
    fastmri_evaluate = pytest.importorskip("fastmri.evaluate")
    bundle, root, models = official.bundle, official.root, tmp_path / "models"
    bundle.train(models, batch_size=1, dataset_dir=str(root), crop_size="recon", output_dir=str(tmp_path / "logs"))
    bundle.run("evaluate", ckpt_dir=str(models), dataset_dir=str(root), output_dir=str(tmp_path / "eval"))
    arguments = SimpleNamespace(
        target_path=root / "multicoil_val",
        predictions_path=tmp_path / "eval" / "multicoil_val",
        acquisition=None,
        acceleration=None,
    )
    # That function cuts a square as wide as the reference; ours is as tall as its 22 rows, so turn both.
    for path, name in (
        (arguments.target_path / "file_v.h5", "reconstruction_rss"),
        (arguments.predictions_path / "file_v.h5", "reconstruction"),
    ):
        with h5py.File(path, "a") as file:
            data = file[name][:].transpose(0, 2, 1)
            del file[name]
            file[name] = data
    theirs = fastmri_evaluate.evaluate(arguments, "reconstruction_rss").means()
    with (
        h5py.File(arguments.target_path / "file_v.h5") as truth,
        h5py.File(arguments.predictions_path / "file_v.h5") as ours,
    ):
        # Both are (3, 30, 22) now, of which that function takes the middle square.
        reference, image = (
            torch.as_tensor(f[n][:, 4:26])[:, None]
            for f, n in ((truth, "reconstruction_rss"), (ours, "reconstruction"))
        )
    # The peak is the volume's: for PSNR and NMSE the slices are an axis of space of one sample.
    one, truth = image.transpose(0, 1), reference.transpose(0, 1)
    peak = reference.max().expand(len(reference))
    assert float(psnr(one, truth)) == pytest.approx(theirs["PSNR"], rel=1e-4)
    assert float(nmse(one, truth)) == pytest.approx(theirs["NMSE"], rel=1e-4)
    assert float(ssim(image, reference, data_range=peak).mean()) == pytest.approx(theirs["SSIM"], rel=1e-4)


def test_volumes_of_several_sizes_in_a_batch_are_one_clear_error(official, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        official.bundle.train(tmp_path / "m", batch_size=4, dataset_dir=str(official.root))
    error = caught.value
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    assert "Take batch_size 1" in str(error)
