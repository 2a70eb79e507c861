import copy
import math

import pytest
import torch
from torch import Tensor, nn

from monai_deqkan.networks.layers import KANLinear, compare_outputs
from monai_deqkan.networks.layers.kan_compare import list_batches, record_calls, relative_change
from monai_deqkan.networks.layers.kan_inputs import kan_layers


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(KANLinear(3, 4), nn.Dropout(0.9), KANLinear(4, 2)).train()


@torch.no_grad()
def test_changes_are_relative_and_each_layers_own() -> None:
    network, x = build(), torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(network)
    other[0].weight.mul_(1.25)
    changes = compare_outputs(network, other, [x[:8], (x[8:],)])
    assert network.training
    assert other[1].training
    network.eval()
    other.eval()
    before, after = network(x), other(x)
    assert changes.network == pytest.approx(rms(after - before) / rms(before), rel=1e-5)
    first = network[0](x[:8])  # the bias is zero: all of the output grows by a quarter
    assert changes.layers["0"] == pytest.approx(rms(other[0](x[:8]) - first) / rms(first), rel=1e-5)
    assert changes.layers == {"0": pytest.approx(0.25, rel=1e-5), "2": 0.0}  # on the input that it had before
    assert "network" in str(changes).splitlines()[-1]


def test_recording_keeps_first_calls_and_leaves_no_hook() -> None:
    network = build()
    calls, outputs = record_calls(network, kan_layers(network), [(torch.zeros(1, 3),), (torch.ones(2, 3),)])
    assert {name: tuple(call.input.shape) for name, call in calls.items()} == {"0": (1, 3), "2": (1, 4)}
    assert [len(output) for output in outputs] == [1, 2]
    assert not outputs[0].requires_grad
    assert all(not layer._forward_hooks for layer in kan_layers(network).values())


def test_nested_outputs_count_whole() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = KANLinear(2, 2)

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"all": [self.layer(x), (2 * x, None)]}

    _, outputs = record_calls(Nested(), {}, [(torch.ones(3, 2),)])
    assert len(outputs) == 2
    assert torch.equal(outputs[1], torch.full((3, 2), 2.0))


def test_no_change_is_zero_and_a_change_of_nothing_infinite() -> None:
    zero, one = [torch.zeros(2)], [torch.ones(2)]
    assert relative_change(zero, zero) == 0.0
    assert relative_change(zero, one) == math.inf
    assert relative_change(one, zero) == 1.0
    with pytest.raises(ValueError, match="empty"):
        list_batches([])
