import csv
import json
import math

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, verify_net_in_out
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from sklearn.metrics import roc_auc_score

CHEST, LUNG, BRAIN = (
    "chest_xray_deqkan_classification",
    "lung_xray_kanunet_segmentation",
    "brain_mri_deq_reconstruction",
)
UNDEFINED = ("val_hd95", "val_surface_distance", "val_precision", "val_f1")
KEY_METRICS = {CHEST: "val_auc", LUNG: "val_mean_dice", BRAIN: "val_psnr"}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_training_leaves_a_model_and_what_it_is_for(bundle):
    state = torch.load(bundle.trained / "model.pt", weights_only=True)
    task = json.loads((bundle.trained / "model.json").read_text())
    assert all(torch.isfinite(value).all() for value in state.values() if torch.is_tensor(value))
    assert task["key_metric"]["name"] == KEY_METRICS[bundle.name]
    assert math.isfinite(task["key_metric"]["value"])
    assert (bundle.trained / "checkpoint_epoch=1.pt").is_file()
    assert any((bundle.work / "trained_logs").iterdir())


def test_training_changes_every_parameter(bundle, tmp_path):
    workflow = bundle.workflow("train", **bundle.tiny, ckpt_dir=str(tmp_path / "m"), output_dir=str(tmp_path / "l"))
    workflow.initialize()
    before = workflow.parser.get_parsed_content("network_def").state_dict()
    after = torch.load(bundle.trained / "model.pt", weights_only=True)
    names = [name for name, _ in workflow.parser.get_parsed_content("network_def").named_parameters()]
    assert [name for name in names if torch.equal(before[name], after[name])] == []


def test_check_properties_of_training_and_inference(bundle, tmp_path):
    train = bundle.workflow("train", **bundle.tiny, ckpt_dir=str(tmp_path / "m"), output_dir=str(tmp_path / "l"))
    train.initialize()
    assert train.check_properties() == []
    inference = bundle.workflow("inference", ckpt_dir=str(bundle.trained), output_dir=str(tmp_path / "p"))
    inference.initialize()
    assert inference.check_properties() == []


def test_check_properties_of_evaluate_laid_over_train(bundle, tmp_path):
    settings = {"ckpt_dir": str(bundle.trained), "output_dir": str(tmp_path / "e")}
    workflow = bundle.workflow_of(["train.json", "evaluate.json"], "train", **settings)
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.parametrize("kind", ["train", "evaluate", "inference"])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cuda:0", torch.device("cuda:1")])
def test_mixed_precision_follows_the_device(bundle, kind, device):
    parser = ConfigParser(ConfigParser.load_config_file(bundle.folder / "configs" / f"{kind}.json"))
    parser["device"] = device
    assert parser.get_parsed_content("amp") is ("cuda" in str(device))


def test_evaluate_laid_over_train_gives_the_same_metrics(make_bundle):
    bundle = make_bundle(LUNG)
    models = bundle.work / "models"
    bundle.train(models)
    found = []
    for name, files in (("alone", ["evaluate.json"]), ("over", ["train.json", "evaluate.json"])):
        output = bundle.work / name
        workflow = bundle.workflow_of(files, "train", ckpt_dir=str(models), output_dir=str(output))
        workflow.initialize()
        workflow.run()
        found.append(json.loads((output / "metrics.json").read_text()))
    assert found[0] == found[1]
    assert math.isfinite(found[0]["val_mean_dice"])


def test_evaluation_crops_as_the_training_did(make_bundle):
    bundle = make_bundle(BRAIN)
    models = bundle.work / "models"
    bundle.train(models, crop_size=[24, 20])
    assert json.loads((models / "model.json").read_text())["sampling"]["crop_size"] == [24, 20]
    bundle.run("evaluate", ckpt_dir=str(models), output_dir=str(bundle.work / "eval"))
    with h5py.File(bundle.work / "eval" / "test" / "scan_0.h5") as file:
        assert file["reconstruction"].shape == (2, 24, 20)


def test_inference_leaves_out_files_without_kspace_and_goes_on_at_empty_slices(make_bundle, caplog):
    bundle = make_bundle(BRAIN)
    models = bundle.work / "models"
    bundle.train(models)
    source = bundle.dataset_dir / "test"
    (source / "broken.h5").write_text("no HDF5")
    with h5py.File(source / "ours.h5", "w") as file:
        file["reconstruction"] = np.ones((1, 4, 4), np.float32)
    with h5py.File(source / "scan_0.h5", "r+") as file:
        file["kspace"][1] = 0
    output = bundle.work / "out"
    bundle.run("inference", ckpt_dir=str(models), dataset_dir=str(source), output_dir=str(output))
    assert sorted(path.name for path in output.glob("*.h5")) == ["scan_0.h5"]
    assert "2 of 3 files" in caplog.text
    with h5py.File(output / "scan_0.h5") as file:
        assert [bool(image.any()) for image in file["reconstruction"]] == [True, False]


def test_inference_finds_the_lines_that_were_measured(make_bundle):
    # 20 columns: a Fourier transform there and back leaves rounding in columns of zeros, which then look measured.
    bundle = make_bundle(BRAIN)
    path = bundle.dataset_dir / "test" / "scan_0.h5"
    with h5py.File(path, "r+") as file:
        file["kspace"][..., 1::2] = 0
        measured = (file["kspace"][0] != 0).any(axis=(0, 1))
    settings = {"dataset_dir": str(path.parent), "ckpt_dir": str(bundle.work), "output_dir": str(bundle.work / "out")}
    workflow = bundle.workflow("inference", **settings)
    workflow.initialize()
    item = workflow.parser.get_parsed_content("dataset")[0]
    assert item["mask"].flatten().tolist() == measured.tolist()


@pytest.fixture
def evaluation(bundle, tmp_path):
    bundle.run("evaluate", ckpt_dir=str(bundle.trained), output_dir=str(tmp_path / "eval"))
    return tmp_path / "eval"


@pytest.fixture
def prediction(bundle, tmp_path):
    settings = {"ckpt_dir": str(bundle.trained), "output_dir": str(tmp_path / "out")}
    bundle.run("inference", dataset_dir=str(bundle.dataset_dir / "test"), **settings)
    return tmp_path / "out"


def test_evaluation_writes_finite_metrics(bundle, evaluation):
    metrics = json.loads((evaluation / "metrics.json").read_text())
    assert KEY_METRICS[bundle.name] in metrics
    # A barely trained network may predict one class only, for which a distance or a ratio does not exist.
    required = {name for name in metrics if not name.startswith(UNDEFINED)}
    assert {name for name in required if metrics[name] is None} == set()
    assert ("solve_converged" in metrics) == (bundle.name != LUNG)


@pytest.mark.parametrize("bundle", [CHEST], indirect=True)
def test_classification_tables(bundle, evaluation, prediction):
    threshold = json.loads((bundle.trained / "model.json").read_text())["threshold"]
    for table, labelled in ((evaluation, True), (prediction, False)):
        rows = rows_of(table / "predictions.csv")
        assert len(rows) == 4
        for row in rows:
            chances = [float(row["probability_NORMAL"]), float(row["probability_PNEUMONIA"])]
            assert sum(chances) == pytest.approx(1, abs=1e-5)
            assert row["prediction"] == ["NORMAL", "PNEUMONIA"][chances[1] >= threshold]
            assert row["solve_status"] == "converged"
            assert int(row["evaluations"]) > 0
            assert "unlike_training" in row
            assert ("label" in row) == labelled
            assert row.get("label", row["image"].split("/")[-2]) == row["image"].split("/")[-2]
    # The same images through both configs: the same probabilities.
    found = [[row["probability_NORMAL"] for row in rows_of(t / "predictions.csv")] for t in (evaluation, prediction)]
    assert np.allclose(np.float64(found[0]), np.float64(found[1]), atol=1e-5)


@pytest.mark.parametrize("bundle", [CHEST], indirect=True)
def test_evaluation_scores_agree_with_the_table(bundle, evaluation):
    metrics = json.loads((evaluation / "metrics.json").read_text())
    rows = rows_of(evaluation / "predictions.csv")
    assert metrics["val_accuracy"] == pytest.approx(np.mean([row["prediction"] == row["label"] for row in rows]))


@pytest.mark.parametrize("bundle", [CHEST], indirect=True)
def test_training_ends_with_a_calibration_that_evaluation_uses(bundle, evaluation):
    record = json.loads((bundle.trained / "model.json").read_text())
    # Four validation images say little: the threshold stays near a half.
    assert record["calibration"]["num_images"] == 4
    assert 0.25 <= record["temperature"] <= 4
    assert 0.1 < record["threshold"] < 0.9
    assert {"contrast", "border_brightness", "resolution"} <= set(record["training_ranges"])
    metrics = json.loads((evaluation / "metrics.json").read_text())
    rows = rows_of(evaluation / "predictions.csv")
    truth = [row["label"] == "PNEUMONIA" for row in rows]
    assert metrics["val_auc"] == pytest.approx(roc_auc_score(truth, [float(r["probability_PNEUMONIA"]) for r in rows]))
    assert metrics["val_auc_low"] <= metrics["val_auc"] <= metrics["val_auc_high"]
    pictures = {"confusion_matrix", "roc", "precision_recall", "reliability", "features"}
    assert {path.stem for path in evaluation.glob("*.png")} == pictures
    page = (evaluation / "report.html").read_text()
    assert "for clinical use" in page
    assert page.count("<img") == 5


def dicom(path, pixels):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.PatientName, file.PatientID, file.StudyDescription = "Secret^Name", "S3CRET", "secret study"
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 12, 11
    file.PixelData = pixels.astype(np.uint16).tobytes()
    file.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("bundle", [CHEST], indirect=True)
def test_inference_on_mixed_files_skips_the_damaged_one_and_draws_saliency(bundle, tmp_path, caplog):
    source = tmp_path / "mixed"
    (source / "sub").mkdir(parents=True)
    good = bundle.dataset_dir / "test" / "NORMAL" / "normal_0.png"
    pixels = np.asarray(Image.open(good))
    Image.fromarray(pixels).save(source / "a.png")
    (source / "broken.png").write_bytes(good.read_bytes()[:200])
    dicom(source / "sub" / "a.dcm", 16 * pixels.astype(np.uint16))
    nib.save(nib.Nifti1Image(pixels.T.astype(np.float32), np.eye(4)), source / "sub" / "a.nii.gz")
    Image.fromarray(255 - pixels).save(source / "inverted.png")
    settings = {"ckpt_dir": str(bundle.trained), "output_dir": str(tmp_path / "out"), "saliency": True}
    bundle.run("inference", dataset_dir=str(source), **settings)
    rows = {row["image"]: row for row in rows_of(tmp_path / "out" / "predictions.csv")}
    assert sorted(rows) == ["a.png", "inverted.png", "sub/a.dcm", "sub/a.nii.gz"]
    # One image in three formats: one probability.
    chances = [float(rows[name]["probability_NORMAL"]) for name in ("a.png", "sub/a.dcm", "sub/a.nii.gz")]
    assert chances == pytest.approx([chances[0]] * 3, abs=1e-5)
    assert "border_brightness" in rows["inverted.png"]["unlike_training"]
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["file"] for entry in record["skipped"]] == ["broken.png"]
    skipped = [message for message in caplog.messages if message.startswith("Skipped")]
    assert len(skipped) == 1
    assert "broken.png" in skipped[0]
    assert sum("unlike the training images" in message for message in caplog.messages) == 1
    overlays = {
        path.relative_to(tmp_path / "out" / "saliency").as_posix(): path for path in tmp_path.rglob("*_saliency.png")
    }
    assert sorted(overlays) == sorted(f"{name}_saliency.png" for name in rows)
    assert all(np.asarray(Image.open(path)).shape == (32, 32, 3) for path in overlays.values())
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"secret" not in written.lower() + caplog.text.lower().encode()


@pytest.mark.parametrize("bundle", [CHEST], indirect=True)
def test_inference_on_a_single_image(bundle, tmp_path):
    single = bundle.dataset_dir / "test" / "NORMAL" / "normal_0.png"
    bundle.run("inference", ckpt_dir=str(bundle.trained), dataset_dir=str(single), output_dir=str(tmp_path / "out"))
    assert [row["image"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == ["normal_0.png"]


@pytest.mark.parametrize("bundle", [LUNG], indirect=True)
def test_segmentation_tables_and_masks(bundle, evaluation, prediction):
    metrics = json.loads((evaluation / "metrics.json").read_text())
    rows = rows_of(evaluation / "images.csv")
    assert [row["image"] for row in rows] == ["test/images/case_0.png", "test/images/case_1.png"]
    assert metrics["val_mean_dice"] == pytest.approx(np.mean([float(row["dice_foreground"]) for row in rows]), abs=1e-4)
    written = sorted(path.relative_to(prediction).as_posix() for path in prediction.rglob("*.png"))
    # Inference takes every image below the folder it is given, here the masks too.
    assert [path for path in written if path.startswith("images/")] == [f"images/case_{i}_mask.png" for i in range(2)]
    for index in range(2):
        mask = np.asarray(Image.open(prediction / f"images/case_{index}_mask.png"))
        image = np.asarray(Image.open(bundle.dataset_dir / f"test/images/case_{index}.png"))
        assert mask.shape == image.shape
        assert set(np.unique(mask)) <= {0, 255}


@pytest.mark.parametrize("bundle", [BRAIN], indirect=True)
def test_reconstructed_volumes(bundle, evaluation, prediction):
    for folder, inside in ((evaluation, "test/scan_0.h5"), (prediction, "scan_0.h5")):
        with h5py.File(folder / inside) as file, h5py.File(bundle.dataset_dir / "test/scan_0.h5") as truth:
            images, reference = file["reconstruction"][:], truth["reconstruction_rss"][:]
            assert file.attrs["slices"].tolist() == [0, 1]
        assert images.dtype == np.float32
        # In the unit of the file, slices in order: nearer to their own reference than zero is.
        for image, own in zip(images, reference, strict=True):
            assert np.linalg.norm(image - own) < 0.7 * np.linalg.norm(own)
        rows = rows_of(folder / "slices.csv")
        assert [(row["file"], row["slice"]) for row in rows] == [(inside, "0"), (inside, "1")]
        assert {row["status"] for row in rows} == {"converged"}
        assert all(float(row["relative_residual"]) <= 1e-2 for row in rows)


@pytest.mark.parametrize("bundle", [LUNG], indirect=True)
def test_segmentation_of_nifti_keeps_the_geometry(bundle, tmp_path):
    affine = np.diag([-0.7, 0.8, 1.0, 1.0])
    affine[:3, 3] = 5, -3, 2
    source = tmp_path / "images" / "scan.nii.gz"
    source.parent.mkdir()
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((45, 39)).astype(np.float32), affine), source)
    settings = {"ckpt_dir": str(bundle.trained), "output_dir": str(tmp_path / "out")}
    bundle.run("inference", dataset_dir=str(source.parent), **settings)
    mask = nib.load(tmp_path / "out" / "scan_mask.nii.gz")
    assert mask.shape[:2] == (45, 39)
    assert np.allclose(mask.affine, affine)
    assert set(np.unique(mask.get_fdata())) <= {0, 255}


def test_resume_goes_on_with_the_next_epoch(bundle, tmp_path):
    ckpt_dir = bundle.copy_of_trained(tmp_path / "models")
    first = torch.load(ckpt_dir / "checkpoint_epoch=1.pt", weights_only=True)
    workflow = bundle.train(ckpt_dir, resume=True, max_epochs=2, output_dir=str(tmp_path / "logs"))
    trainer = workflow.parser.get_parsed_content("train#trainer")
    steps = first["trainer"]["iteration"]
    assert trainer.state.epoch == 2
    assert trainer.state.iteration == 2 * steps
    assert torch.load(ckpt_dir / "checkpoint_epoch=2.pt", weights_only=True)["trainer"]["iteration"] == 2 * steps
    optimizer = workflow.parser.get_parsed_content("optimizer")
    assert {int(state["step"]) for state in optimizer.state.values()} == {2 * steps}
    assert not (ckpt_dir / "previous").exists()


def test_resume_goes_on_with_the_same_logs(make_bundle):
    bundle = make_bundle(CHEST)
    models = bundle.work / "models"
    for settings in ({}, {}, {"resume": True, "max_epochs": 3}):
        bundle.train(models, **settings)
    assert [float(row["epoch"]) for row in rows_of(bundle.work / "logs" / "history.csv")] == [1]
    assert [float(row["epoch"]) for row in rows_of(bundle.work / "logs_2" / "history.csv")] == [1, 2, 3]
    assert not (bundle.work / "logs_3").exists()


def test_longer_training_after_resume_has_the_learning_rates_of_its_new_length(make_bundle):
    bundle = make_bundle(CHEST)
    models = bundle.work / "models"
    bundle.train(models, max_epochs=1)
    workflow = bundle.workflow("train", **bundle.tiny, ckpt_dir=str(models), resume=True, max_epochs=4)
    workflow.initialize()
    optimizer = workflow.parser.get_parsed_content("optimizer")
    trainer = workflow.parser.get_parsed_content("train#trainer")
    rates = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: rates.append(optimizer.param_groups[0]["lr"]))
    workflow.run()
    # Epochs 2 to 4 of 4: the end of the rise over two epochs, then the cosine at the start and half of its fall.
    factors = [2 / 3, *(0.02 + 0.98 * (1 + math.cos(math.pi * t / 2)) / 2 for t in (0, 1))]
    assert rates == pytest.approx([1e-3 * factor for factor in factors])


def test_early_stop_is_resumed(make_bundle):
    bundle = make_bundle(LUNG)
    models = bundle.work / "models"
    bundle.train(models, max_epochs=2, patience=5)
    saved = torch.load(models / "checkpoint_epoch=2.pt", weights_only=True)["early_stop"]
    workflow = bundle.train(models, resume=True, max_epochs=3, patience=5)
    stop = workflow.parser.get_parsed_content("early_stop")
    history = rows_of(bundle.work / "logs" / "history.csv")
    best = max(float(row["val_mean_dice"]) for row in history)
    assert saved["best_score"] == pytest.approx(max(float(row["val_mean_dice"]) for row in history[:2]))
    assert stop.state_dict()["best_score"] == pytest.approx(best)


def test_new_training_moves_the_old_one_aside(bundle, tmp_path):
    ckpt_dir = bundle.copy_of_trained(tmp_path / "models")
    weights = (ckpt_dir / "model.pt").read_bytes()
    bundle.train(ckpt_dir, output_dir=str(tmp_path / "logs"))
    assert (ckpt_dir / "previous" / "model.pt").read_bytes() == weights
    assert (ckpt_dir / "model.pt").is_file()


def test_trainings_with_one_seed_are_equal(bundle, tmp_path):
    bundle.train(tmp_path / "models", output_dir=str(tmp_path / "logs"))
    again = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    first = torch.load(bundle.trained / "model.pt", weights_only=True)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("n", [1, 2])
def test_network_takes_and_gives_what_the_metadata_say(bundle, n):
    configs = bundle.folder / "configs"
    verify_net_in_out(
        "network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
        n=n,
        ckpt_dir=str(bundle.work / "none"),
    )
