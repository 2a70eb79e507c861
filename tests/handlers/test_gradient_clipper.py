import pytest
import torch
from monai.engines import SupervisedTrainer
from torch import nn

from monai_deqkan.handlers import GradientClipper


def step(scale, max_norm=None):
    """Return the weights' change in one step of plain gradient descent with rate 1."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    before = [p.detach().clone() for p in network.parameters()]
    SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[{"image": torch.ones(4, 3), "label": torch.zeros(4, 2)}],
        network=network,
        optimizer=optimizer,
        loss_function=lambda pred, label: scale * (pred + 3).sum(),
        train_handlers=[GradientClipper(optimizer, max_norm)] if max_norm else [],
    ).run()
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, network.parameters(), strict=True)])


@pytest.mark.parametrize("scale", [0.01, 5.0])
def test_norm_of_all_gradients_together_is_bounded(scale):
    free, clipped = step(scale), step(scale, max_norm=2.0)
    expected = free * min(1.0, 2.0 / float(free.norm()))
    assert torch.allclose(clipped, expected, rtol=1e-4)
    assert (float(clipped.norm()) == pytest.approx(2.0, rel=1e-4)) == (scale > 1)


class Scaler:
    def __init__(self):
        self.unscaled = []

    def is_enabled(self):
        return True

    def unscale_(self, optimizer):
        self.unscaled.append(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= 1024


def test_scaled_gradients_are_unscaled_first_and_infinite_ones_left():
    parameter = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    engine = type("E", (), {"scaler": Scaler()})()
    parameter.grad = torch.tensor([3.0, 4.0]) * 1024
    GradientClipper(optimizer, 2.0)(engine)
    assert engine.scaler.unscaled == [optimizer]
    assert torch.allclose(parameter.grad, torch.tensor([1.2, 1.6]))
    parameter.grad = torch.tensor([float("inf"), 1.0])
    GradientClipper(optimizer, 2.0)(engine)
    assert parameter.grad.tolist()[0] == float("inf")
    assert parameter.grad.tolist()[1] == pytest.approx(1 / 1024)


def test_bad_norms_are_refused():
    with pytest.raises(ValueError, match="max_norm"):
        GradientClipper(torch.optim.SGD([torch.zeros(1)], lr=1.0), 0.0)
