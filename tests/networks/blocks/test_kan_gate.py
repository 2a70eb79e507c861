from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_deqkan.networks.blocks import KANGate


def test_equals_the_formula() -> None:
    torch.manual_seed(0)
    gate = KANGate(2, 4, 6, features=3).double()
    torch.nn.init.constant_(gate.attention.conv.bias, 0.3)
    skip, signal = torch.randn(2, 4, 7, 9).double(), torch.randn(2, 6, 3, 4).double()
    ws, wg = gate.skip.weight[:, :, 0, 0], gate.gate.weight[:, :, 0, 0]
    up = F.interpolate(torch.einsum("fc,bchw->bfhw", wg, signal), size=(7, 9), mode="bilinear", align_corners=False)
    hidden = torch.einsum("fc,bchw->bfhw", ws, skip) + gate.skip.bias.view(1, 3, 1, 1) + up
    hidden = (hidden - hidden.mean((2, 3), keepdim=True)) / (
        hidden.var((2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    functions = gate.attention.conv.edge_functions(hidden.flatten())[:, 0, :, 0, 0].view(*hidden.shape, 3)
    total = 0.3 + sum(functions[:, f, :, :, f] for f in range(3))
    torch.testing.assert_close(gate(skip, signal), skip * torch.sigmoid(total)[:, None])
    weights = gate.weights(skip, signal)
    assert 0 < weights.min() < weights.max() < 1


@pytest.mark.parametrize("dims", [2, 3])
def test_learns_to_follow_the_signal(dims: int) -> None:
    """The wanted pixels are where the signal is near zero, which no weighted ReLU of it alone can say."""
    torch.manual_seed(0)
    gate = KANGate(dims, 2, 1, features=4)
    skip = torch.randn(2, 2, *[8] * dims)
    signal = torch.randn(2, 1, *[8] * dims)
    target = (signal.abs() < 0.5).float()
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(150):
        loss = F.binary_cross_entropy(gate.weights(skip, signal), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((gate.weights(skip, signal) > 0.5).float() == target).float().mean() > 0.9


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, and still asked for by users
def test_scripts_and_exports() -> None:
    torch.manual_seed(0)
    gate = KANGate(2, 4, 8, norm="batch").eval()
    pair = torch.randn(1, 4, 9, 8), torch.randn(1, 8, 5, 4)
    torch.testing.assert_close(torch.jit.script(gate)(*pair), gate(*pair))
    torch.testing.assert_close(torch.export.export(gate, pair).module()(*pair), gate(*pair))


def test_wrong_settings() -> None:
    for arguments in ((1, 4, 4), (2, 0, 4), (2, 4, 0)):
        with pytest.raises(ValueError, match=r"spatial_dims|channels"):
            KANGate(*arguments)
