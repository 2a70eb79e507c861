"""Whatever a user does wrong, the chain of errors ends in a sentence that says so."""

import json

import h5py
import numpy as np
import pytest

CHEST, LUNG, BRAIN = (
    "chest_xray_deqkan_classification",
    "lung_xray_kanunet_segmentation",
    "brain_mri_deq_reconstruction",
)


def chain(error):
    """Return the messages of an error and of those that caused it."""
    messages = []
    while error is not None:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(messages)


def failure(bundle, kind, tmp_path, **override):
    override.setdefault("output_dir", str(tmp_path / "out"))
    override.setdefault("ckpt_dir", str(tmp_path / "models"))
    with pytest.raises(Exception) as caught:  # noqa: PT011 (MONAI wraps errors in several kinds; the text is compared)
        bundle.run(kind, **(bundle.tiny if kind == "train" else {}), **override)
    return chain(caught.value)


def test_missing_data_set(bundle, tmp_path):
    text = failure(bundle, "train", tmp_path, dataset_dir=str(tmp_path / "nowhere"))
    assert f"does not exist: {tmp_path / 'nowhere'}. Check the path." in text


def test_missing_train_folder(bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").write_text("of an earlier training")
    text = failure(bundle, "train", tmp_path, dataset_dir=str(tmp_path / "empty"))
    assert "train" in text
    assert "Expected layout: train/" in text
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["model.pt"]  # not moved aside


def test_nothing_to_infer_on(bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    settings = {"ckpt_dir": str(bundle.trained), "dataset_dir": str(tmp_path / "empty")}
    text = failure(bundle, "inference", tmp_path, **settings)
    assert "There is no *.h5 file in" in text or "No image was found below" in text


@pytest.mark.parametrize("kind", ["evaluate", "inference"])
def test_missing_model(bundle, kind, tmp_path):
    text = failure(bundle, kind, tmp_path, ckpt_dir=str(tmp_path / "none"))
    assert f"{tmp_path / 'none' / 'model.pt'}. Run the bundle's train.json first." in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["train", "evaluate", "inference"])
def test_output_folder_in_use(bundle, kind, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    models = bundle.copy_of_trained(tmp_path / "models")
    before = sorted(path.name for path in models.iterdir())
    text = failure(bundle, kind, tmp_path, ckpt_dir=str(models))
    assert f"already holds files: {tmp_path / 'out'}. Nothing was written" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in models.iterdir()) == before


def test_default_output_folder_is_a_new_one_each_time(bundle):
    for kind, name in (("evaluate", "eval"), ("inference", "predictions")):
        for _ in range(2):
            bundle.run(kind, ckpt_dir=str(bundle.trained), dataset_dir=str(bundle.dataset_dir))
        assert sorted(path.name for path in bundle.work.glob(f"{name}*")) == [name, f"{name}_2"]


def test_damaged_weights(bundle, tmp_path):
    models = bundle.copy_of_trained(tmp_path / "cut")
    weights = models / "model.pt"
    weights.write_bytes(weights.read_bytes()[:1000])
    text = failure(bundle, "inference", tmp_path, ckpt_dir=str(models))
    assert f"The weights in {weights} do not fit this network, or the file is damaged" in text


def test_resume_without_a_checkpoint(bundle, tmp_path):
    text = failure(bundle, "train", tmp_path, resume=True)
    assert "No readable checkpoint `checkpoint_epoch=*.pt`" in text


def test_empty_class(make_bundle, tmp_path):
    bundle = make_bundle(CHEST)
    for file in (bundle.dataset_dir / "train" / "NORMAL").iterdir():
        file.unlink()
    assert "must hold at least one image; got 0" in failure(bundle, "train", tmp_path)


@pytest.mark.parametrize("bundle", [CHEST], indirect=True)
def test_classes_of_another_data_set(make_bundle, bundle, tmp_path):
    other = make_bundle(CHEST)
    (other.dataset_dir / "test" / "NORMAL").rename(other.dataset_dir / "test" / "HEALTHY")
    text = failure(other, "evaluate", tmp_path, ckpt_dir=str(bundle.trained))
    assert "missing ['NORMAL'], unknown ['HEALTHY']" in text


def test_mask_without_image(make_bundle, tmp_path):
    bundle = make_bundle(LUNG)
    (bundle.dataset_dir / "train" / "images" / "case_1.png").unlink()
    assert "each mask must have an image of the same name; case_1 have none" in failure(bundle, "train", tmp_path)


def test_kspace_of_wrong_rank(make_bundle, tmp_path):
    bundle = make_bundle(BRAIN)
    for path in (bundle.dataset_dir / "train").iterdir():
        with h5py.File(path, "w") as file:
            file["kspace"] = np.zeros((8, 8), dtype=np.complex64)
    text = failure(bundle, "train", tmp_path)
    assert "all 2 *.h5 files are unusable" in text
    assert "shape (slices, coils, H, W)" in text


def test_description_of_a_model_cut_short(bundle, tmp_path):
    models = bundle.copy_of_trained(tmp_path / "cut")
    (models / "model.json").write_text(json.dumps({"a": 1})[:4])
    text = failure(bundle, "evaluate", tmp_path, ckpt_dir=str(models))
    assert f"The model's description cannot be read: {models / 'model.json'}" in text
