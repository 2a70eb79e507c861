import copy
import pickle

import pytest
import torch
from torch import nn

from monai_deqkan.losses import JacobianLoss, JacobianRegularizedLoss
from monai_deqkan.networks.blocks import KANCell
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.networks.nets import DEQKANClassifier
from monai_deqkan.solvers import FixedPointIteration


class Cell(nn.Module):
    """``tanh(z W) + x``."""

    def __init__(self, size=5, norm=0.7):
        super().__init__()
        matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.matrix = nn.Parameter(norm * matrix / torch.linalg.matrix_norm(matrix, 2))

    def forward(self, z, x):
        return torch.tanh(z @ self.matrix) + x


def data(batch=3, size=5, dtype=torch.float64):
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def dense_loss(cell, z, x):
    """Mean over samples of ``|J|_F^2 / N`` from the dense Jacobians."""
    rows = [
        torch.autograd.functional.jacobian(lambda a, i=i: cell(a[None], x[i : i + 1])[0], z[i], create_graph=True)
        for i in range(len(z))
    ]
    return torch.stack([row.square().sum() / len(row) for row in rows]).mean()


def test_mean_over_probes_is_the_dense_frobenius_norm():
    torch.manual_seed(0)
    cell, x = Cell(), data()
    exact = dense_loss(cell, 0.3 * x, x)
    loss = JacobianLoss(num_probes=2000)(cell, 0.3 * x, x)
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)
    found, expected = (torch.autograd.grad(value, cell.matrix)[0] for value in (loss, exact))
    assert (found - expected).norm() <= 0.05 * expected.norm()


def test_gradient_of_a_probe_matches_finite_differences():
    x = data(2, 3)

    def penalty(matrix, z):
        torch.manual_seed(0)
        return JacobianLoss()(lambda z, x: torch.tanh(z @ matrix) + x, z, x)

    z = data(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(penalty, (torch.eye(3, dtype=torch.float64).requires_grad_(), z))


def test_gradient_through_the_equilibrium_matches_finite_differences():
    cell, x = Cell(3), data(2, 3)
    layer = DEQLayer(cell, FixedPointIteration(rtol=1e-13, max_iter=500), ("implicit", {"solver": TIGHT}))

    def penalty(matrix):
        with torch.no_grad():
            cell.matrix.copy_(matrix)
        z = layer(x)
        torch.manual_seed(0)
        return JacobianLoss()(cell, z, x)

    found = torch.autograd.grad(penalty(cell.matrix.detach().clone()), cell.matrix)[0]
    start, step = cell.matrix.detach().clone(), 1e-6
    for i in range(3):
        for j in range(3):
            moved = torch.zeros_like(start)
            moved[i, j] = step
            slope = (penalty(start + moved).item() - penalty(start - moved).item()) / (2 * step)
            assert found[i, j].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


TIGHT = FixedPointIteration(rtol=1e-13, max_iter=500)


def test_complex_and_tuple_states_and_constant_cells():
    torch.manual_seed(0)
    loss = JacobianLoss(num_probes=500)
    z = torch.complex(data(4, 50), data(4, 50))
    assert loss(lambda z: 0.6j * z, z).item() == pytest.approx(0.36, rel=0.02)
    pair = (data(4, 50), data(4, 50))
    assert loss(lambda z: (0.5 * z[1], z[0] * 0.1), pair).item() == pytest.approx((0.25 + 0.01) / 2, rel=0.02)
    assert loss(lambda z, x: x, data(), data()).item() == 0


def test_kan_cell_is_differentiated_twice_and_the_penalty_falls():
    torch.manual_seed(0)
    cell = KANCell(4, contraction=0.95)
    layer, x = DEQLayer(cell), data(8, 4, torch.float32)
    loss = JacobianRegularizedLoss(lambda z: 0 * z.sum(), layer, weight=1.0, num_probes=8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        value = loss(layer(x))
        value.backward()
        optimizer.step()
        values.append(value.item())
    z = layer(x).detach()
    assert dense_loss(cell, z, x).item() < 0.7 * values[0]


def test_regularized_loss_is_the_loss_plus_the_weighted_penalty():
    cell, x = Cell(), data()
    layer = DEQLayer(cell, TIGHT)
    loss = JacobianRegularizedLoss(nn.MSELoss(), layer, weight=0.5, num_probes=2000)
    torch.manual_seed(0)
    z = layer(x)
    expected = nn.MSELoss()(z, x) + 0.5 * dense_loss(cell, z.detach(), x)
    assert loss(z, x).item() == pytest.approx(expected.item(), rel=0.02)
    with pytest.raises(RuntimeError, match="Call it anew"):
        loss(z, x)
    with torch.no_grad():
        assert loss(layer(x), x).item() == nn.MSELoss()(z, x).item()
    layer(x)
    layer(2 * x)  # the last call counts
    assert len(loss._found._found) == 1
    loss.remove()
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert JacobianRegularizedLoss(nn.MSELoss(), layer, weight=0.0)(layer(x), x).item() == nn.MSELoss()(z, x).item()


def test_network_and_its_copies_stay_as_they_are():
    torch.manual_seed(0)
    network = DEQKANClassifier(2, 1, 2, features=(4, 4, 8, 8), hidden_features=6, dropout=0.0)
    image, label = torch.rand(3, 1, 32, 32), torch.tensor([0, 1, 0])
    names = list(network.state_dict())
    expected = network(image).detach()
    loss = JacobianRegularizedLoss(nn.CrossEntropyLoss(), network, weight=0.1)
    assert torch.equal(network(image), expected)
    assert list(network.state_dict()) == names
    assert list(loss.parameters()) == []
    twin = copy.deepcopy(network)
    loss._found.take()
    twin(image)
    assert loss._found.take() == []
    assert isinstance(pickle.loads(pickle.dumps(DEQLayer(Cell(), TIGHT))), DEQLayer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(network(image), label)
    value.backward()
    gradient = network.projection.weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


def test_hooks_do_not_keep_a_layer_from_being_pickled():
    layer = DEQLayer(Cell(), TIGHT)
    loss = JacobianRegularizedLoss(nn.MSELoss(), layer)
    other = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(data()), layer(data()))
    assert len(loss._found.take()) == 1


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="must have an equilibrium layer, such as DEQLayer; Linear has none"):
        JacobianRegularizedLoss(nn.MSELoss(), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`network` must be"):
        JacobianRegularizedLoss(nn.MSELoss(), len)
    with pytest.raises(TypeError, match="`loss` must be callable"):
        JacobianRegularizedLoss(1.0, DEQLayer(Cell()))
    with pytest.raises(ValueError, match="weight"):
        JacobianRegularizedLoss(nn.MSELoss(), DEQLayer(Cell()), weight=-1.0)
    with pytest.raises(ValueError, match="num_probes"):
        JacobianLoss(0)


def test_power_iterations_find_the_largest_eigenvalue_and_leave_what_is_below_the_bound():
    torch.manual_seed(0)
    matrix = torch.diag(torch.tensor([1.5, 0.5, 0.4, 0.3], dtype=torch.float64))

    def cell(z: torch.Tensor) -> torch.Tensor:
        return z @ matrix.T

    z = torch.zeros(3, 4, dtype=torch.float64)
    loss = JacobianLoss(power_iterations=30, bound=0.9)
    assert float(loss(cell, z)) == pytest.approx(0.6**2, rel=1e-6)
    assert float(JacobianLoss(power_iterations=30, bound=1.6)(cell, z)) == 0.0


def test_its_gradient_pulls_the_largest_eigenvalue_down_alone():
    torch.manual_seed(0)
    slopes = torch.tensor([1.5, 0.5], dtype=torch.float64, requires_grad=True)
    JacobianLoss(power_iterations=40, bound=0.9)(
        lambda z: z * slopes, torch.zeros(2, 2, dtype=torch.float64)
    ).backward()
    torch.testing.assert_close(slopes.grad, torch.tensor([1.2, 0.0], dtype=torch.float64), atol=1e-6, rtol=1e-6)
