import csv

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image

from monai_deqkan.data import write_kspace
from monai_deqkan.handlers import ReconstructionWriter
from monai_deqkan.networks.blocks import ContractionBound
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.solvers import FixedPointIteration, open_recorders


class Cell(torch.nn.Module):
    def forward(self, z, x):
        return 0.5 * z + x


def run(
    tmp_path,
    samples,
    batch_size=1,
    solve=True,
    size=(3, 2),
    pixel_scale=None,
    layer=None,
    spread=None,
    kspace=None,
    maps=None,
    broken=(),
    **settings,
):
    """Write ``[(file, slice, value)]`` as constant complex images ``3 v + 4 v i``, each in unit 1 / 2."""
    layer = layer or DEQLayer(Cell(), FixedPointIteration(rtol=1e-3))
    channels = torch.tensor([3.0, 4.0] + ([] if spread is None else [spread])).view(-1, 1, 1)
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]

    def step(engine, index):
        batch = batches[index]
        more = {} if pixel_scale is None else {"pixel_scale": pixel_scale}
        more |= {} if kspace is None else {"kspace": kspace}
        more |= {} if maps is None else {"sensitivity_maps": maps}
        engine.state.batch = [
            {"source": str(file), "slice": i, "scale": 2.0, "broken": i in broken, **more} for file, i, _ in batch
        ]
        if solve:
            layer(torch.ones(len(batch), 1))
        return [{"pred": channels.expand(-1, *size) * value} for _, _, value in batch]

    engine = Engine(step)
    ReconstructionWriter(tmp_path / "out", tmp_path / "in", **settings).attach(engine)
    engine.run(range(len(batches)), max_epochs=1)
    with (tmp_path / "out" / "slices.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def volume(path):
    with h5py.File(path) as file:
        return file["reconstruction"][:], file.attrs["slices"].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_volumes_in_order_and_in_the_unit_of_the_file(tmp_path, batch_size):
    a, b = tmp_path / "in" / "site" / "a.h5", tmp_path / "in" / "b.h5"
    rows = run(tmp_path, [(a, 2, 1.0), (a, 0, 2.0), (a, 5, 3.0), (b, 0, 7.0), (b, 1, 8.0)], batch_size)
    images, slices = volume(tmp_path / "out" / "site" / "a.h5")
    assert slices == [0, 2, 5]
    assert images.dtype == np.float32
    assert images.shape == (3, 3, 2)
    # |3 v + 4 v i| = 5 v, times the scale 2.
    assert np.allclose(images, 10 * np.array([2, 1, 3]).reshape(3, 1, 1))
    images, slices = volume(tmp_path / "out" / "b.h5")
    assert slices == [0, 1]
    assert np.allclose(images, 10 * np.array([7, 8]).reshape(2, 1, 1))
    assert [(row["file"], row["slice"]) for row in rows[:2]] == [("site/a.h5", "2"), ("site/a.h5", "0")]
    # 2 ** -(k - 1) / (2 - 2 ** -(k - 1)) <= 1e-3 first at k = 10.
    assert {(row["evaluations"], row["status"]) for row in rows} == {("10", "converged")}
    assert all(float(row["relative_residual"]) <= 1e-3 for row in rows)


def test_a_broken_slice_is_left_out_and_said_to_be_broken(tmp_path):
    a, b = tmp_path / "in" / "a.h5", tmp_path / "in" / "b.h5"
    rows = run(tmp_path, [(a, 0, 1.0), (a, 1, 2.0), (a, 2, 3.0), (b, 1, 1.0)], 2, broken=(1,))
    images, slices = volume(tmp_path / "out" / "a.h5")
    assert slices == [0, 2]
    assert np.allclose(images, 10 * np.array([1, 3]).reshape(2, 1, 1))
    assert not (tmp_path / "out" / "b.h5").exists()  # nothing of it is left
    assert [row["status"] for row in rows] == ["converged", "broken", "converged", "broken"]
    assert rows[1]["relative_residual"] == ""


def test_a_reconstruction_of_simulated_data_says_so(tmp_path):
    for name, simulated in (("a", True), ("b", False)):
        write_kspace(
            tmp_path / "in" / f"{name}.h5",
            torch.ones(1, 1, 6, 4, dtype=torch.complex64),
            attrs={"simulated": True} if simulated else {},
        )
    run(tmp_path, [(tmp_path / "in" / "a.h5", 0, 1.0), (tmp_path / "in" / "b.h5", 0, 1.0)], 1)
    for name, simulated in (("a", True), ("b", False)):
        with h5py.File(tmp_path / "out" / f"{name}.h5") as file:
            assert bool(file.attrs.get("simulated", False)) is simulated


def write_source(path, rows=6, columns=4, **sizes):
    write_kspace(path, torch.ones(3, 1, rows, columns, dtype=torch.complex64), **sizes)
    return path


def test_nifti_has_the_pixels_of_the_header_and_the_picture_s_axes(tmp_path, caplog):
    known = write_source(tmp_path / "in" / "a.h5", pixel_size=(0.5, 0.7, 5.0))
    unknown = write_source(tmp_path / "in" / "b.h5")
    samples = [(known, 0, 1.0), (known, 2, 2.0), (unknown, 1, 3.0)]
    rows = run(tmp_path, samples, size=(6, 4), formats="nifti")
    assert [row["file"] for row in rows] == ["a.nii.gz", "a.nii.gz", "b.nii.gz"]
    assert not list((tmp_path / "out").glob("*.h5"))
    image = nib.load(tmp_path / "out" / "a.nii.gz")
    assert image.shape == (4, 6, 2)
    np.testing.assert_allclose(image.get_fdata()[0, 0], [10.0, 20.0])
    # Every second slice was reconstructed.
    np.testing.assert_allclose(image.affine, np.diag([-0.7, -0.5, 10.0, 1.0]), rtol=1e-6)
    assert image.header["descrip"].tobytes().strip(b"\0") == b"Research only; not for clinical use."
    image = nib.load(tmp_path / "out" / "b.nii.gz")
    np.testing.assert_allclose(image.affine[:3, 3], [0, 0, 1])
    assert image.header.get_zooms() == (1, 1, 1)
    assert "tells no pixel size" in caplog.text


def test_nifti_of_a_lower_resolution_has_larger_pixels(tmp_path):
    source = write_source(tmp_path / "in" / "a.h5", pixel_size=(0.5, 0.7, 5.0))
    run(tmp_path, [(source, 0, 1.0)], size=(3, 4), formats=["h5", "nifti"], pixel_scale=[2.0, 1.0])
    assert nib.load(tmp_path / "out" / "a.nii.gz").header.get_zooms() == pytest.approx((0.7, 1.0, 5.0))


def test_pictures_to_look_at(tmp_path):
    file = tmp_path / "in" / "a.h5"
    rows = run(tmp_path, [(file, i, 1.0 + i) for i in range(7)], spread=1.0, size=(30, 20), formats="png")
    assert {row["file"] for row in rows} == {"a.png"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "a_spread.png", "slices.csv"]
    with Image.open(tmp_path / "out" / "a.png") as picture:
        assert picture.size == (5 * 200, 2 * (300 + 16) + 16)  # five in a row, ten times as large
        grey = np.asarray(picture)
    assert grey[16 + 150, 100] == round(255 / 7)  # the first, with one window for all
    assert grey[316 + 16 + 150, 300] == 255
    with pytest.raises(FileExistsError, match=r"a\.png"):
        run(tmp_path, [(file, 0, 1.0)])


@pytest.mark.parametrize(("size", "kept"), [("recon", (4, 3)), ([3, -1], (3, 5)), ([9, 2], (7, 2))])
def test_images_are_cropped_around_their_centre(tmp_path, size, kept):
    source = write_source(tmp_path / "in" / "a.h5", rows=4, columns=3)
    run(tmp_path, [(source, 0, 1.0)], size=(7, 5), image_size=size)
    assert volume(tmp_path / "out" / "a.h5")[0].shape == (1, *kept)


@pytest.mark.parametrize(
    "settings", [{"formats": "dicom"}, {"formats": []}, {"image_size": "full"}, {"image_size": [3]}]
)
def test_other_outputs_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ReconstructionWriter(tmp_path / "out", tmp_path / "in", **settings)


def test_network_without_a_solve_leaves_its_columns_empty(tmp_path):
    rows = run(tmp_path, [(tmp_path / "in" / "a.h5", 0, 1.0)], solve=False)
    assert list(rows[0])[:5] == ["file", "slice", "evaluations", "relative_residual", "status"]
    assert (rows[0].pop("file"), rows[0].pop("slice"), rows[0].pop("border_signal")) == ("a.h5", "0", "1.000e+00")
    assert set(rows[0].values()) == {""}


class CertifiedHalf(Cell):
    def certified_contraction(self, x=None):
        return ContractionBound(0.5, ("the slope",))


@pytest.mark.parametrize("certified", [True, False])
def test_proven_and_estimated_errors(tmp_path, certified):
    layer = DEQLayer(CertifiedHalf() if certified else Cell(), FixedPointIteration(rtol=1e-3))
    source = tmp_path / "in" / "a.h5"
    samples = [(source, 1, 1.0), (source, 0, 1.0)]
    rows = run(tmp_path, samples, batch_size=2, layer=layer, network=layer, estimate_error=True)
    # z = 2 - 2 ** -8 after nine steps from zero, f(z) = 2 - 2 ** -9: the residual is 2 ** -9, the error 2 ** -8.
    for row in rows:
        assert row["certified_factor"] == ("0.500000" if certified else "")
        assert row["error_bound"] == (f"{2**-8 / (2 - 2**-9):.3e}" if certified else "")
        assert float(row["estimated_error"]) == pytest.approx(2**-8 / (2 - 2**-8), rel=1e-3)
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        assert file["solve/evaluations"][:].tolist() == [10, 10]
        assert file["solve/status"].asstr()[:].tolist() == ["converged", "converged"]
        assert file["solve/error_bound"][0] == (pytest.approx(2**-8 / (2 - 2**-9)) if certified else np.inf)
        assert file.attrs["note"].endswith("Research only; not for clinical use.")
    assert open_recorders() == ()
    assert not layer._forward_hooks


def test_a_third_channel_is_written_as_spread(tmp_path):
    source = write_source(tmp_path / "in" / "a.h5")
    samples = [(source, 1, 1.0), (source, 0, 2.0)]
    run(tmp_path, samples, spread=0.5, size=(6, 4), formats=["h5", "nifti"], image_size=[4, -1])
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        # The channels 3 v, 4 v and 0.5 v, times the scale 2.
        np.testing.assert_allclose(file["reconstruction"][:, 0, 0], [20, 10])
        np.testing.assert_allclose(file["spread"][:, 0, 0], [2, 1])
        assert file["spread"].shape == file["reconstruction"].shape == (2, 4, 4)
    np.testing.assert_allclose(nib.load(tmp_path / "out" / "a_spread.nii.gz").get_fdata()[0, 0], [2, 1])


@pytest.mark.parametrize(("coils", "warns"), [((4,), True), ((1,), False), ((2, 4), False)])
def test_an_object_at_the_border_is_told_where_it_may_fold_over(tmp_path, caplog, coils, warns):
    file = tmp_path / "in" / "a.h5"
    rows = run(tmp_path, [(file, 0, 1.0), (file, 1, 1.0)], maps=torch.ones(*coils, 3, 2))
    assert [row["border_signal"] for row in rows] == ["1.000e+00"] * 2  # the same everywhere
    assert caplog.text.count("--num_map_sets 2") == warns
    with h5py.File(tmp_path / "out" / "a.h5") as written:
        assert written["solve/border_signal"][:].tolist() == [1.0, 1.0]


def test_data_unlike_those_of_the_training_are_named(tmp_path, caplog):
    ranges = {"coils": [4, 8], "rows": [6, 6], "acceleration": [1.5, 4.5], "log_noise_level": [-1.0, 1.0]}
    kspace = torch.ones(2, 6, 4, dtype=torch.complex64)
    rows = run(tmp_path, [(tmp_path / "in" / "a.h5", 0, 1.0)], kspace=kspace, training_ranges=ranges)
    assert rows[0]["unlike_training"] == "coils acceleration"
    assert "unlike the training data in: coils, acceleration" in caplog.text


def test_existing_volume_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.h5").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"a\.h5 exists and was not touched\. Name a new `output_dir`"):
        run(tmp_path, [(tmp_path / "in" / "a.h5", 0, 1.0)])
    assert (tmp_path / "out" / "a.h5").read_bytes() == b"mine"


def test_files_of_one_name_from_two_folders_get_numbers(tmp_path):
    samples = [
        (tmp_path / site / "a.h5", 0, value) for site, value in (("x", 1.0), ("y", 2.0), ("in", 3.0), ("z", 4.0))
    ]
    rows = run(tmp_path, samples)
    found = {path.name: volume(path)[0].max() for path in (tmp_path / "out").glob("*.h5")}
    assert found == pytest.approx({"a.h5": 10.0, "a_2.h5": 20.0, "a_3.h5": 30.0, "a_4.h5": 40.0})
    assert [row["file"] for row in rows] == ["a.h5", "a_2.h5", "a_3.h5", "a_4.h5"]


def test_slices_of_one_file_that_do_not_follow_each_other_are_refused(tmp_path):
    a, b = tmp_path / "in" / "a.h5", tmp_path / "in" / "b.h5"
    with pytest.raises(ValueError, match=r"a\.h5 came again after another file\. Read the slices in order"):
        run(tmp_path, [(a, 0, 1.0), (b, 0, 1.0), (a, 1, 1.0)])
    assert open_recorders() == ()


def test_an_exception_leaves_no_recorder_open(tmp_path):
    def step(engine, batch):
        raise RuntimeError("broken slice")

    engine = Engine(step)
    ReconstructionWriter(tmp_path / "out", tmp_path / "in").attach(engine)
    with pytest.raises(RuntimeError, match="broken slice"):
        engine.run([0], max_epochs=1)
    assert open_recorders() == ()
