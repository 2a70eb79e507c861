"""The networks on a GPU under mixed precision, against themselves on the CPU."""

import copy

import pytest
import torch
from torch import nn

from monai_deqkan.networks.nets import DEQKANClassifier, DEQReconstructor, KANUNet
from monai_deqkan.operators import equispaced_mask, simulate_kspace, smooth_coil_maps
from monai_deqkan.solvers import SolveRecorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def measurement():
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(2, 24, 20, dtype=torch.complex64)
    image[:, 6:18, 5:15], image[:, 9:12, 8:11] = 1.0, 0.4j
    maps = smooth_coil_maps((24, 20), 4, generator=generator)
    mask = equispaced_mask(20, 2, 0.3, generator=generator).view(1, 1, 1, -1)
    return simulate_kspace(image, maps) * mask, mask, maps[None]


def pictures():
    return (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)),)


# Smooth activations and average pooling: rounding must not choose another branch of a maximum.
CASES = {
    "DEQReconstructor": (lambda: DEQReconstructor(2, num_layers=2, features=4), measurement),
    "KANUNet": (lambda: KANUNet(2, 1, 2, features=(4, 8), down="avgpool"), pictures),
    "DEQKANClassifier": (
        lambda: DEQKANClassifier(
            2,
            1,
            3,
            backbone=nn.Sequential(nn.Conv2d(1, 8, 3), nn.SiLU()),
            backbone_channels=8,
            hidden_features=6,
            pool="avg",
        ),
        pictures,
    ),
}


def evaluated(network, inputs, device, *, mixed):
    """Return the output and all gradients in one vector, on the CPU, and the recorder of both passes."""
    inputs = [tensor.to(device) for tensor in inputs]
    network = copy.deepcopy(network).to(device)
    with SolveRecorder() as recorder:
        with torch.autocast(device, enabled=mixed):
            output = network(*inputs)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(device)
        (output.float() * weight).sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    return output.detach().float().cpu(), gradient.float().cpu(), recorder


@pytest.mark.parametrize("name", CASES)
def test_cuda_under_autocast_agrees_with_the_cpu(name):
    make, inputs = CASES[name]
    torch.manual_seed(0)
    network = make().eval()
    expected, expected_gradient, _ = evaluated(network, inputs(), "cpu", mixed=False)
    output, gradient, recorder = evaluated(network, inputs(), "cuda", mixed=True)
    assert ((output - expected).norm() / expected.norm()).item() < 0.02
    assert ((gradient - expected_gradient).norm() / expected_gradient.norm()).item() < 0.1
    # The backward pass runs in a thread of its own there; its solves are recorded all the same.
    if name.startswith("DEQ"):
        assert recorder.converged("forward").tolist() == [True, True]
        assert recorder.converged("backward").tolist() == [True, True]
