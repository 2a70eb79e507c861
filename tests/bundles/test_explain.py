import json

import pytest

LUNGS = "lung_xray_kanunet_segmentation"


@pytest.mark.parametrize("bundle", [LUNGS], indirect=True)
def test_explanation_of_the_trained_model(bundle, tmp_path):
    settings = {
        "ckpt_dir": str(bundle.trained),
        "output_dir": str(tmp_path / "x"),
        "num_images": 1,
        "num_functions": 1,
        "num_channels": 1,
        "pruning_amounts": [0.0, 0.5],
    }
    workflow = bundle.workflow_of(["evaluate.json", "explain.json"], "train", **settings)
    workflow.initialize()
    workflow.run()
    numbers = json.loads((tmp_path / "x/interpretation.json").read_text())
    page = (tmp_path / "x/interpretation.html").read_text()
    assert (numbers["images"], numbers["network"]) == (1, "KANUNet")
    assert [row["amount"] for row in numbers["pruning"]] == [0.0, 0.5]
    assert "case_" not in page
