"""What a user's own bundle, outside of this repository, can name."""

import json

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import SegResNet, UNet

from monai_deqkan.networks.layers import KANActivation
from monai_deqkan.networks.nets import KANUNet


def test_short_names_after_the_import_line(tmp_path):
    config = {
        "imports": ["$import monai_deqkan"],
        "net": {"_target_": "KANUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": [2, 4]},
    }
    (tmp_path / "own.json").write_text(json.dumps(config))
    parser = ConfigParser()
    parser.read_config(tmp_path / "own.json")
    parser.parse()
    network = parser.get_parsed_content("net")
    assert isinstance(network, KANUNet)
    torch.manual_seed(0)
    image = torch.rand(1, 1, 16, 16)
    assert torch.isfinite(network(image)).all()


NETWORKS = [
    (2, lambda act: UNet(2, 1, 2, channels=(4, 8), strides=(2,), act=act)),
    (3, lambda act: UNet(3, 1, 2, channels=(2, 4), strides=(2,), act=act)),
    (2, lambda act: SegResNet(2, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,), act=act)),
]


@pytest.mark.parametrize(("spatial_dims", "build"), NETWORKS, ids=["UNet-2D", "UNet-3D", "SegResNet-2D"])
@pytest.mark.parametrize("act", ["kan", ("kan", {"grid_size": 4})])
def test_act_kan_in_networks_of_monai(spatial_dims, build, act):
    torch.manual_seed(0)
    network = build(act)
    activations = [module for module in network.modules() if isinstance(module, KANActivation)]
    assert activations
    network(torch.rand(2, 1, *[16] * spatial_dims)).square().mean().backward()
    for activation in activations:
        for parameter in activation.parameters():
            assert torch.isfinite(parameter.grad).all()
            assert float(parameter.grad.abs().max()) > 0
