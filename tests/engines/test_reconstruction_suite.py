import csv
import json

import h5py
import numpy as np
import pytest
import torch

from monai_deqkan import cli
from monai_deqkan.data import copy_bundle, write_kspace
from monai_deqkan.engines import (
    RIVALS,
    SuiteSettings,
    TunedWeights,
    evaluate_reconstructions,
    trained_maps_method,
    tune_reconstruction,
)
from monai_deqkan.engines import reconstruction_suite as suite
from monai_deqkan.engines.reconstruction_cases import is_simulated, make_case
from monai_deqkan.engines.reconstruction_methods import load_method
from monai_deqkan.engines.reconstruction_tuning import search_weights
from monai_deqkan.metrics import head_region, nmse, psnr, ssim, vif
from monai_deqkan.networks.nets import DEQReconstructor
from monai_deqkan.operators import FourierOperator, MRIOperator, espirit_maps, simulate_kspace, smooth_coil_maps
from monai_deqkan.transforms import NormalizeKspace

SIZE = (48, 44)
SETTINGS = SuiteSettings(masks=("random",), accelerations=(2, 4), center_fraction=0.2)


def phantom(slices):
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE[0]), torch.linspace(-1, 1, SIZE[1]), indexing="ij")
    rings = [(x**2 + y**2 < 0.7) * (1 + 0.4 * torch.sign(torch.sin((4 + s) * x + 3 * y))) for s in range(slices)]
    return torch.stack(rings).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("kspace")
    maps = smooth_coil_maps(SIZE, 4, generator=torch.Generator().manual_seed(0))
    write_kspace(root / "a.h5", simulate_kspace(phantom(2), maps), attrs={"patient_id": "SECRET-NAME"})
    write_kspace(root / "b.h5", simulate_kspace(phantom(1).flip(-1), maps))
    with h5py.File(root / "undersampled.h5", "w") as file:
        file["kspace"] = np.ones((1, 4, *SIZE), dtype=np.complex64)
        file["mask"] = np.ones(SIZE[1])
    return root


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    weights = TunedWeights([{"method": "tv", "mask": "random", "acceleration": 4, "snr_db": None, "weight": 1e-2}])
    result = evaluate_reconstructions(folder, out, ("zero_filled", "tv"), SETTINGS, weights=weights, progress=False)
    return out, result, weights


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_metrics_on_what_the_method_gives(folder, finished):
    out, result, _ = finished
    table = rows(out / "slices.csv")
    assert len(table) == 3 * 2 * 2
    scenario = SETTINGS.scenarios()[1]
    row = next(r for r in table if (r["file"], r["slice"], r["acceleration"]) == ("a.h5", "1", "4.0"))
    case = make_case({"kspace": str(folder / "a.h5"), "slice": 1}, "a.h5", scenario, SETTINGS)
    image = MRIOperator(case.mask, case.maps).adjoint(case.kspace).abs()[None]
    reference = torch.linalg.vector_norm(
        torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(full(folder, 1), dim=(-2, -1)), norm="ortho"), (-2, -1)),
        dim=0,
    )[None, None]
    torch.testing.assert_close(case.reference, reference)
    for name, metric in (("psnr", psnr), ("ssim", ssim), ("nmse", nmse), ("vif", vif)):
        expected = float(metric(image, reference, head_region(reference)))
        assert float(row[name]) == pytest.approx(expected, rel=1e-4)
    values = [float(r["psnr"]) for r in table if r["method"] == "tv" and r["acceleration"] == "4.0"]
    summary = next(r for r in result["results"] if r["method"] == "tv" and r["acceleration"] == 4)
    assert summary["psnr"] == pytest.approx(np.mean(values))
    assert (summary["num_slices"], summary["num_volumes"], summary["weight"]) == (3, 2, 1e-2)
    assert summary["share_converged"] == 1
    assert summary["net_acceleration"] == pytest.approx(44 / 11)
    zero = next(r for r in result["results"] if r["method"] == "zero_filled" and r["acceleration"] == 4)
    assert summary["psnr"] > zero["psnr"] + 1


def full(folder, index):
    with h5py.File(folder / "a.h5") as file:
        return torch.from_numpy(file["kspace"][index])


def test_report_and_tables_are_there_and_hold_no_header_values(finished):
    out, result, _ = finished
    html = (out / "report.html").read_text()
    for text in ("Research only", "0.1 of the slice", "zero_filled", "Error maps", "coil maps", "data:image/png"):
        assert text in html
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix in (".csv", ".json", ".html")]
    assert not [path for path in files if "SECRET-NAME" in path.read_text()]
    assert json.loads((out / "summary.json").read_text())["results"] == result["results"]
    parts = {part["part"]: part for part in result["profile"]}
    assert set(parts) == {"reading and masking", "coil maps", "zero_filled", "tv"}
    assert parts["tv"]["peak_memory_mib"] > SIZE[0] * SIZE[1] * 8 / 2**20


def test_a_run_goes_on_where_it_stopped_and_no_other_run_mixes_in(folder, finished, monkeypatch):
    out, result, weights = finished
    cells = sorted((out / "cells").glob("*.json"))
    before = {path: path.stat().st_mtime_ns for path in cells}
    cells[0].unlink()
    scored = []
    original = suite._score
    monkeypatch.setattr(suite, "_score", lambda cell, *rest: scored.append(cell) or original(cell, *rest))
    again = evaluate_reconstructions(folder, out, ("zero_filled", "tv"), SETTINGS, weights=weights, progress=False)
    assert len(scored) == 2
    assert [path.stat().st_mtime_ns for path in cells[1:]] == [before[path] for path in cells[1:]]
    for new, old in zip(again["results"], result["results"], strict=True):
        assert new["psnr"] == pytest.approx(old["psnr"])
    with pytest.raises(FileExistsError, match="other data, methods or settings"):
        evaluate_reconstructions(folder, out, ("zero_filled",), SETTINGS, progress=False)


def test_phase_axis_and_crop(folder, tmp_path):
    item, scenario = {"kspace": str(folder / "b.h5"), "slice": 0}, SETTINGS.scenarios()[0]
    last = make_case(item, "b.h5", scenario, SETTINGS)
    first = make_case(item, "b.h5", scenario, SuiteSettings(phase_axis="first"))
    assert last.kspace.shape[-2:] == SIZE
    assert first.kspace.shape[-2:] == SIZE[::-1]
    torch.testing.assert_close(first.reference.transpose(-1, -2), last.reference)
    shorter = make_case(item, "b.h5", scenario, SuiteSettings(phase_axis="shorter"))
    torch.testing.assert_close(shorter.kspace, last.kspace)
    settings = SuiteSettings(masks=("random",), accelerations=(2,), center_fraction=0.2, crop=(42, 44))
    evaluate_reconstructions(folder, tmp_path / "out", ("zero_filled",), settings, progress=False)
    with np.load(next((tmp_path / "out" / "cells").glob("b*.npz"))) as arrays:
        np.testing.assert_allclose(arrays["reference"], last.reference[0, 0, 3:45].numpy(), rtol=1e-6)


def test_tuning_finds_the_best_of_a_dense_grid_and_evaluation_uses_it(folder, tmp_path, capsys):
    settings = ["--masks", "random", "--accelerations", "4", "--center-fraction", "0.2", "--quiet", "--noise", "30"]
    tuned = tmp_path / "w.json"
    words = ["reconstruction", "tune", str(folder), "--method", "cg_sense", "--out", str(tuned), *settings]
    assert cli.main(words) == 0
    entry = json.loads(tuned.read_text())["entries"][0]
    scenario = SuiteSettings(masks=("random",), accelerations=(4,), center_fraction=0.2, noise=(30.0,)).scenarios()[0]
    items = [{"kspace": str(folder / f), "slice": s} for f, s in (("a.h5", 0), ("a.h5", 1), ("b.h5", 0))]
    cases = [make_case(i, i["kspace"].rpartition("/")[2], scenario, SuiteSettings()) for i in items]
    quality = {}
    for steps in range(1, 31):
        images = [RIVALS["cg_sense"](c.kspace, c.mask, c.maps, steps).image for c in cases]
        quality[steps] = np.mean([float(psnr(x, c.reference, c.region)) for x, c in zip(images, cases, strict=True)])
    assert entry["psnr"] == pytest.approx(quality[int(entry["weight"])], abs=1e-4)
    assert entry["psnr"] > max(quality.values()) - 0.1
    out = tmp_path / "run"
    words = ["reconstruction", "evaluate", str(folder), "--methods", "cg_sense", "--out", str(out), *settings]
    assert cli.main([*words, "--weights", str(tuned)]) == 0
    assert {row["weight"] for row in rows(out / "slices.csv")} == {str(entry["weight"])}
    assert "report.html" in capsys.readouterr().out
    assert cli.main(words) == 2
    assert "other data, methods or settings" in capsys.readouterr().err


def test_simulated_files_are_told_apart_and_named_in_the_statement(folder, tmp_path):
    data = tmp_path / "data"
    kspace = torch.randn(1, 2, 48, 48, dtype=torch.complex64)
    write_kspace(data / "a.h5", kspace, attrs={"simulated": True})
    write_kspace(data / "b.h5", kspace)
    assert [is_simulated(data / name) for name in ("a.h5", "b.h5")] == [True, False]
    settings = SuiteSettings(masks=("random",), accelerations=(2,), center_fraction=0.2)
    result = evaluate_reconstructions(data, tmp_path / "out", ("zero_filled",), settings, progress=False)
    assert result["statement"].startswith("1 of 2 files hold SIMULATED k-space.")


def test_a_value_given_twice_counts_once():
    once, twice = (SuiteSettings(masks=("random",), accelerations=a, noise=(None, 20.0)) for a in ((4, 8), (4, 8, 4.0)))
    assert twice.scenarios() == once.scenarios()
    assert len(once.scenarios()) == 4


def test_nearest_tuned_weight():
    entries = [
        {"method": "tv", "mask": mask, "acceleration": r, "snr_db": snr, "weight": w}
        for mask, r, snr, w in (("random", 4, None, 1), ("random", 8, None, 2), ("equispaced", 4, 20, 3))
    ]
    tuned = TunedWeights(entries)
    assert tuned.find("tv", "random", 7, None) == 2
    assert tuned.find("tv", "equispaced", 4, None) == 1
    assert tuned.find("tv", "random", 4, 25) == 3
    assert tuned.find("wavelet", "random", 4, None) is None
    noisy = TunedWeights([{**entries[0], "snr_db": 0, "weight": 4}, {**entries[0], "snr_db": 30}])
    assert noisy.find("tv", "random", 4, 10) == 4
    assert noisy.find("tv", "random", 4, None) == 1


@pytest.mark.parametrize("num_refine", range(6))
def test_tuning_tries_as_many_weights_as_it_is_told(num_refine):
    tried = search_weights(lambda weight: -((np.log(weight) + 4) ** 2), RIVALS["tv"], 5, num_refine)
    assert len(tried) == 5 + num_refine
    errors = [abs(np.log(weight) + 4) for weight in tried]
    assert min(errors) < (0.1 if num_refine == 5 else 1.5)


def test_bad_input_is_refused(folder, tmp_path):
    (tmp_path / "weights.json").write_text("[]")
    for call, message in (
        (lambda: SuiteSettings(masks=("spiral",)), "must be one of"),
        (lambda: SuiteSettings(region="brain"), "region"),
        (lambda: SuiteSettings(noise=(float("nan"),)), "finite ratios"),
        (lambda: SuiteSettings(crop=(4, 4)), "crop"),
        (lambda: evaluate_reconstructions(folder, tmp_path / "o", ("tvv",)), "Did you mean 'tv'"),
        (lambda: evaluate_reconstructions(folder, tmp_path / "o", ("tv", "tv")), "each once"),
        (
            lambda: evaluate_reconstructions(folder, tmp_path / "o", weights=[tmp_path / "weights.json"]),
            "tuned weights",
        ),
        (
            lambda: evaluate_reconstructions(
                folder, tmp_path / "o2", ("tv",), SuiteSettings(simulated_coils=4), progress=False
            ),
            "single-coil",
        ),
        (lambda: tune_reconstruction(folder, "zero_filled", tmp_path / "w"), "must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_maps_method_is_what_gives_the_maps(folder):
    settings = SuiteSettings(masks=("random",), accelerations=(2,), center_fraction=0.2, maps_method="espirit")
    item = {"kspace": str(folder / "a.h5"), "slice": 0}
    case = make_case(item, "a.h5", settings.scenarios()[0], settings)
    torch.testing.assert_close(case.maps, espirit_maps(case.kspace, case.mask))
    assert "by ESPIRiT" in suite.statement(settings)
    with pytest.raises(ValueError, match="maps_method"):
        SuiteSettings(maps_method="espirt")


def test_a_bundle_says_how_its_maps_were_made(tmp_path):
    models = tmp_path / "bundle" / "models"
    models.mkdir(parents=True)
    (tmp_path / "bundle" / "configs").mkdir()
    (tmp_path / "bundle" / "configs" / "inference.json").write_text("{}")
    assert trained_maps_method(tmp_path / "bundle") is None
    (models / "model.json").write_text(json.dumps({"sampling": {"maps_method": "espirit"}}))
    assert trained_maps_method(tmp_path / "bundle") == "espirit"
    assert trained_maps_method("tv") is None
    assert trained_maps_method(tmp_path / "absent") is None


def test_map_sets_are_joined_by_their_root_sum_of_squares(folder):
    item = {"kspace": str(folder / "a.h5"), "slice": 0}
    case = make_case(item, "a.h5", SETTINGS.scenarios()[0], SETTINGS)
    sets = espirit_maps(case.kspace, case.mask, num_sets=2)
    coils = FourierOperator(2).adjoint(case.kspace)
    parts = [(sets[:, m].conj() * coils).sum(1).abs() for m in range(2)]
    expected = (parts[0].square() + parts[1].square()).sqrt()[None]
    torch.testing.assert_close(RIVALS["zero_filled"](case.kspace, case.mask, sets).image, expected)


def test_a_model_in_a_folder_of_models_is_built_by_its_own_settings(folder, tmp_path):
    root = tmp_path / "bundle"
    copy_bundle("brain_mri_deq_reconstruction", root)
    settings = {"form": "contracting", "prior": "ridge", "num_layers": 2, "features": 4, "contraction": 0.9}
    torch.manual_seed(0)
    network = DEQReconstructor(2, **settings, num_cg_steps=2, solver=("anderson", {"rtol": 1e-2}))
    weights = root / "models" / "certified" / "model.pt"
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), weights)
    task = {"sampling": {}, "network": {**settings, "num_cg_steps": 2, "rtol": 1e-2, "max_iter": 50}}
    weights.with_name("model.json").write_text(json.dumps(task))
    method = load_method(weights)
    assert method.name == "bundle/certified"
    case = make_case({"kspace": str(folder / "a.h5"), "slice": 0}, "a.h5", SETTINGS.scenarios()[0], SETTINGS)
    kspace, scale = NormalizeKspace()(case.kspace[0])
    with torch.no_grad():
        image = network.eval()(kspace[None], case.mask, case.maps).square().sum(1, keepdim=True).sqrt() * scale
    torch.testing.assert_close(method(case.kspace, case.mask, case.maps).image, image, rtol=1e-4, atol=1e-6)
