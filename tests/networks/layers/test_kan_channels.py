import pytest
import torch
from torch import Tensor

from monai_deqkan.networks.layers import KANActivation, KANConv2d, KANLayer, KANLinear
from monai_deqkan.networks.layers.kan_channels import (
    channel_edges,
    grid_coordinates,
    grid_ends,
    grid_inputs,
    input_channels,
    input_rows,
    layer_edges,
    num_channels,
)

DOUBLE = torch.float64
SCALE, SHIFT = torch.tensor([1.0, -0.5, 2.0, 4.0], dtype=DOUBLE), torch.tensor([0.0, 1.0, -3.0, 0.5], dtype=DOUBLE)


def layers() -> dict[str, KANLayer]:
    grouped = KANConv2d(4, 6, (1, 2), groups=2, dtype=DOUBLE)
    grouped.set_input_map(SCALE, SHIFT)
    return {"linear": KANLinear(4, 3, dtype=DOUBLE), "grouped": grouped}


@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_rows_and_channels_hold_the_values_of_each_channel(name: str) -> None:
    layer = layers()[name]
    x = torch.arange(120.0, dtype=DOUBLE).view((2, 3, 5, 4) if name == "linear" else (2, 4, 3, 5))
    expected = [(x[..., c] if name == "linear" else x[:, c]).flatten() for c in range(num_channels(layer))]
    assert torch.equal(input_rows(layer, x), torch.stack(expected, dim=1))
    assert torch.equal(input_channels(layer, x.float()), torch.stack(expected))
    assert torch.equal(input_rows(layer, x[0]), input_rows(layer, x[:1]))


def test_grid_of_each_channel_goes_through_the_input_map() -> None:
    plain, mapped = layers().values()
    ends = torch.stack(((-3.0 - SHIFT) / SCALE, (3.0 - SHIFT) / SCALE), dim=1)
    torch.testing.assert_close(grid_ends(mapped), ends)
    assert torch.equal(grid_ends(plain), torch.tensor([[-3.0, 3.0]] * 4, dtype=DOUBLE))
    for layer in (plain, mapped):
        x = grid_inputs(layer)
        t = torch.linspace(-3.0, 3.0, x.shape[1], dtype=DOUBLE)[:, None].expand(-1, 4)
        torch.testing.assert_close(grid_coordinates(layer, x.t()), t)


def test_edges_of_a_channel_are_those_that_read_it() -> None:
    layer = layers()["grouped"]
    coefficients = layer.coefficients.detach()  # (6, K, 2, 1, 2)
    edges = channel_edges(layer, coefficients)
    assert edges.shape == (4, layer.basis.num_basis, 6)
    # Channel 2 is the first of the second group, which the outputs 3 to 5 read.
    expected: Tensor = coefficients[3:, :, 0].flatten(2).transpose(0, 1).flatten(1)
    assert torch.equal(edges[2], expected)
    assert torch.equal(layer_edges(layer, edges), coefficients)


def test_wrong_layers_and_inputs_are_named() -> None:
    linear, conv = layers().values()
    with pytest.raises(ValueError, match=r"\(\*, 4\); got \(2, 3\)"):
        input_rows(linear, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(B, 4, 2 spatial axes\); got \(4, 3\)"):
        input_rows(conv, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least one value"):
        input_channels(linear, torch.zeros(0, 4))
    with pytest.raises(ValueError, match="finite"):
        input_channels(linear, torch.full((1, 4), torch.nan))
    with pytest.raises(TypeError, match="Give its `functions`"):
        num_channels(KANActivation(2))  # type: ignore[arg-type]
