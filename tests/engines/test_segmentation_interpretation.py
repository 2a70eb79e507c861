import json
import re

import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

from monai_deqkan.engines import interpret_segmenter, write_segmenter_interpretation
from monai_deqkan.networks.layers import KANConv2d
from monai_deqkan.networks.nets import KANUNet


def batches_of(*space, count=2):
    images = 8 * torch.rand(count, 1, *space, generator=torch.Generator().manual_seed(0)) - 4
    return [{"image": images, "label": (images > 0).long()}]


@pytest.fixture(scope="module")
def known():
    """A network of known functions: a sine, a straight line, one that no formula is near, and one that is nothing."""
    network = nn.Sequential(
        KANConv2d(1, 4, 1, grid_size=24, base_activation=None, bias=False), nn.Conv2d(4, 2, 3, padding=1)
    )
    layer = network[0]
    points = torch.linspace(-3, 3, 801, dtype=torch.float64)
    odd = torch.sin(2 * points) + torch.sin(7 * points) + 0.5 * torch.cos(11 * points)
    with torch.no_grad():
        for out, values in enumerate((3 * torch.sin(2 * points), 0.2 * points, odd, 0 * points)):
            layer.coefficients[out, :, 0, 0, 0] = layer.basis.fit(points, values).float()
    return interpret_segmenter(network, batches_of(24, 24)).numbers


def test_readout_of_known_functions(known):
    functions = {row["out_channel"]: row for row in known["functions"]["0"]}
    assert list(functions) == [0, 2, 1, 3]  # by importance
    assert sum(row["share_of_layer"] for row in functions.values()) == pytest.approx(1)
    assert not functions[2]["is_simple"]
    # The inputs reach beyond the grid, where splines fade: the readout is of the whole range seen.
    assert functions[0]["r2"] > 0.8


def test_sine_within_the_grid():
    layer = KANConv2d(1, 2, 1, grid_size=12, base_activation=None, bias=False)
    points = torch.linspace(-3, 3, 801, dtype=torch.float64)
    with torch.no_grad():
        layer.coefficients[:, :, 0, 0, 0] = layer.basis.fit(points, torch.sin(2 * points)).float()
    images = 6 * torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) - 3
    found = interpret_segmenter(layer, [{"image": images, "label": (images > 0).long()}], num_functions=1).numbers
    (row,) = found["functions"][""]
    assert re.fullmatch(r"(0\.99\d*|1(\.00\d*)?) sin\((1\.99\d*|2(\.00\d*)?) x.*\).*", row["formula"])
    assert row["is_simple"]
    assert row["r2"] > 0.999
    assert found["channels"] == []  # the layer's output is the network's


def test_statistics_of_known_layers(known):
    (row,) = known["layers"]
    assert (row["edges"], row["zero_edges"], row["dead_edges"]) == (4, 1, 1)
    assert row["outside_grid"] == pytest.approx(0.25, abs=0.02)  # inputs in [-4, 4], grid [-3, 3]
    assert row["half_of_the_signal_in"] == 1
    assert (known["edges"], known["images"]) == (4, 2)
    assert known["first_layer"]["layer"] == "1"
    assert not known["first_layer"]["is_kan"]


def test_page_and_numbers(tmp_path):
    torch.manual_seed(0)
    network = KANUNet(2, 1, 2, features=(2, 4))
    batches = batches_of(16, 16)
    batches[0]["image_meta_dict"] = {"filename_or_obj": "/data/Jane_Doe.png"}
    settings = {"num_functions": 1, "num_channels": 1}
    page = write_segmenter_interpretation(network, batches, tmp_path / "out", **settings)
    text = page.read_text()
    numbers = json.loads((tmp_path / "out/interpretation.json").read_text())
    assert "Research only; not for clinical use." in text
    assert numbers["intended_use"] == "Research only; not for clinical use."
    assert "Jane" not in text + json.dumps(numbers)
    assert text.count("<figure>") == 5 + len(numbers["layers"])
    assert text.count("<figcaption>Shows") == text.count("<figure>")
    assert text.count("Conclude: ") == text.count("<figure>") + 1  # the formulas are a table
    assert 'src="data:image/png;base64' in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert [row["amount"] for row in numbers["pruning"]] == [0, 0.25, 0.5, 0.75]
    assert numbers["pruning"][0]["dice"] == numbers["dice"]
    assert numbers["first_layer"]["layer"] == "stem.0.conv"
    assert numbers == json.loads(json.dumps(interpret_segmenter(network, batches, **settings).numbers))
    with pytest.raises(FileExistsError, match="nothing was written"):
        write_segmenter_interpretation(network, batches, tmp_path / "out")


def test_volumes_and_activations(tmp_path):
    torch.manual_seed(0)
    page = write_segmenter_interpretation(
        KANUNet(3, 1, 2, features=(2, 2)),
        batches_of(8, 8, 8, count=1),
        tmp_path / "3d",
        num_functions=1,
        num_channels=1,
    )
    assert "cut into slices" in page.read_text()
    network = UNet(2, 1, 2, channels=(2, 4), strides=(2,), act="kan")
    page = write_segmenter_interpretation(network, batches_of(8, 8), tmp_path / "act", num_functions=1, num_channels=1)
    assert "is a plain convolution" in page.read_text()
    assert "This does not apply: activations are the only KAN layers" in page.read_text()


def test_networks_without_kan_layers():
    with pytest.raises(ValueError, match="must hold KAN layers"):
        interpret_segmenter(UNet(2, 1, 2, channels=(2, 4), strides=(2,)), batches_of(8, 8))
