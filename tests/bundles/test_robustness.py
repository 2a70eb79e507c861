import csv
import json

import pytest
import torch
from monai.transforms import Compose

from monai_deqkan.engines import robustness_score

CHEST = "chest_xray_deqkan_classification"


@pytest.mark.parametrize("bundle", [CHEST], indirect=True)
def test_robustness_of_the_trained_model_is_that_of_its_evaluation_images(bundle, tmp_path):
    settings = {"ckpt_dir": str(bundle.trained), "output_dir": str(tmp_path / "r"), "num_attacked": 2}
    workflow = bundle.workflow_of(["robustness.json"], "train", **settings)
    workflow.initialize()
    workflow.run()
    report = json.loads((tmp_path / "r/robustness.json").read_text())
    with (tmp_path / "r/robustness.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (tmp_path / "r/robustness.png").is_file()
    assert len(rows) == 1 + 30 + 6
    evaluate = bundle.workflow_of(
        ["evaluate.json"], "train", ckpt_dir=str(bundle.trained), output_dir=str(tmp_path / "e")
    )
    evaluate.initialize()
    items = evaluate.parser.get_parsed_content("validate#dataset")
    assert isinstance(items.transform, Compose)
    images = torch.stack([item["image"].as_tensor() for item in items])
    labels = torch.tensor([item["label"] for item in items])
    network = evaluate.parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(bundle.trained / "model.pt", weights_only=True))
    expected = robustness_score(network, images, labels)
    assert (report["images"], report["attacked_images"]) == (4, 2)
    assert report["score"] == pytest.approx(expected.score)
