import configparser
import json

import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle.properties import MetaProperties
from monai.utils import BundleProperty

import monai_deqkan

CONFIGS = ("metadata", "train", "evaluate", "inference", "multi_gpu_train")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_json_without_machine_paths(bundle, name):
    text = (bundle.folder / "configs" / f"{name}.json").read_text()
    assert isinstance(json.loads(text), dict)
    assert not any(path in text for path in ("/home/", "/root/", "/work/", "/tmp/", "C:\\"))


def test_required_files(bundle):
    assert "Apache License" in (bundle.folder / "LICENSE").read_text()
    logging = configparser.ConfigParser()
    logging.read(bundle.folder / "configs" / "logging.conf")
    assert logging["logger_root"]["handlers"] == "consoleHandler"


def test_metadata(bundle):
    metadata = json.loads((bundle.folder / "configs" / "metadata.json").read_text())
    required = {name for name, prop in MetaProperties.items() if prop[BundleProperty.REQUIRED]}
    assert required | {"schema", "changelog", "name", "task", "description", "authors", "copyright"} <= set(metadata)
    assert metadata["schema"].endswith("meta_schema_20240725.json")
    assert metadata["version"] in metadata["changelog"]
    assert "Not for clinical use" in metadata["intended_use"]
    assert set(metadata["network_data_format"]) == {"inputs", "outputs"}


def test_required_packages_name_this_release(bundle):
    metadata = json.loads((bundle.folder / "configs" / "metadata.json").read_text())
    assert metadata["required_packages_version"]["monai-deqkan"] == monai_deqkan.__version__


def test_model_card_has_the_sections_of_the_model_zoo(bundle):
    card = (bundle.folder / "docs" / "README.md").read_text()
    lines = card.splitlines()
    for section in (
        "# Model Overview",
        "## Data",
        "## Training configuration",
        "### Input",
        "### Output",
        "## Performance",
        "## MONAI Bundle Commands",
        "# References",
        "# License",
    ):
        assert section in lines
    assert "Not for clinical use" in card


def test_settings_named_in_the_model_card_exist(bundle):
    """Every ``--option`` of the card's commands is a top-level id of a config or an argument of MONAI's command."""
    known = {"config_file", "meta_file", "net_id", "standalone", "nnodes", "nproc_per_node"}
    for file in (bundle.folder / "configs").glob("*.json"):
        known |= set(ConfigParser.load_config_file(file))
    card = (bundle.folder / "docs" / "README.md").read_text()
    words = [word.strip("`.,;()") for word in card.split() if word.startswith(("--", "`--"))]
    options = {word.removeprefix("--").partition("=")[0] for word in words}
    assert options
    assert options <= known


@pytest.mark.parametrize("name", ["ce", "bce"])
def test_class_weights_give_every_class_the_same_share_of_either_loss(make_bundle, name):
    config = ConfigParser.load_config_file(
        make_bundle("chest_xray_deqkan_classification").folder / "configs/train.json"
    )
    labels = torch.tensor([0, 0, 0, 1])
    gradients = []
    for weights in ("$torch.tensor([2 / 3, 2.0])", None):
        parts = {"num_classes": 2, "class_weights": weights, "losses": config["losses"]}
        logits = torch.zeros(4, 2, requires_grad=True)
        loss = ConfigParser({"imports": ["$import torch"], **parts}).get_parsed_content(f"losses#{name}")
        loss(logits, labels).backward()
        gradients.append(logits.grad.sum(0))
    torch.testing.assert_close(gradients[0], torch.zeros(2))
    assert gradients[1][0] < 0 < gradients[1][1]
