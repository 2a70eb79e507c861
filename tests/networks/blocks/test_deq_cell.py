import copy

import pytest
import torch
from torch import nn

from monai_deqkan.networks.blocks import CertifiedMap, KANCell, Measurement, MLPCell, ReconstructionCell
from monai_deqkan.networks.nets import DnCNN
from monai_deqkan.operators import MRIOperator, equispaced_mask, smooth_coil_maps
from monai_deqkan.solvers import AndersonSolver, FixedPointIteration, solve_fixed_point


def random(*shape, seed, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed_factor(cell, x, shape):
    """Return the largest ratio of ``|f(a) - f(b)|`` to ``|a - b|`` over near and far pairs of points."""
    largest = 0.0
    with torch.no_grad():
        for seed, (scale, distance) in enumerate([(1, 1), (1, 1e-2), (3, 1), (0.1, 5), (1, 1e-1)]):
            a = random(*shape, seed=2 * seed, scale=scale)
            direction = random(*shape, seed=2 * seed + 1)
            for _ in range(8):  # power iteration by differences finds steeper directions
                b = a + distance * direction / direction.flatten(1).norm(dim=1).view(-1, *[1] * (len(shape) - 1))
                direction = cell(b, x) - cell(a, x)
                ratio = direction.flatten(1).norm(dim=1) / (b - a).flatten(1).norm(dim=1)
                largest = max(largest, ratio.max().item())
    return largest


def train_a_little(cell, x, shape):
    optimizer = torch.optim.SGD(cell.parameters(), lr=5.0)
    for step in range(3):
        optimizer.zero_grad()
        (-cell(random(*shape, seed=90 + step), x).square().mean()).backward()  # pushes the outputs apart
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"grid_size": 8, "spline_order": 2}, {"base_activation": None}])
@pytest.mark.parametrize("contraction", [0.5, 0.9])
def test_kan_cell_contracts_before_and_after_training(settings, contraction):
    torch.manual_seed(0)
    cell, x = KANCell(6, contraction=contraction, kan_settings=settings), random(4, 6, seed=99)
    assert 0.01 * contraction < observed_factor(cell, x, (4, 6)) <= contraction * (1 + 1e-4)
    train_a_little(cell, x, (4, 6))
    assert observed_factor(cell, x, (4, 6)) <= contraction * (1 + 1e-4)


def test_kan_cell_has_one_equilibrium_whatever_the_start_and_the_solver():
    torch.manual_seed(0)
    cell, x = KANCell(6).double(), random(4, 6, seed=99).double()
    solvers = (AndersonSolver(rtol=1e-10, max_iter=500), FixedPointIteration(rtol=1e-10, max_iter=500))
    with torch.no_grad():
        found = [
            solve_fixed_point(cell, random(4, 6, seed=seed, scale=10).double(), solver, x).z
            for seed in (1, 2)
            for solver in solvers
        ]
    for z in found:
        assert torch.allclose(z, found[0], atol=1e-7)
        assert torch.allclose(cell(z, x), z, atol=1e-7)


def test_kan_cell_adds_the_injection():
    torch.manual_seed(0)
    cell, z = KANCell(6), random(4, 6, seed=1)
    with torch.no_grad():
        assert torch.allclose(
            cell(z, random(4, 6, seed=2)) - cell(z, torch.zeros(4, 6)), random(4, 6, seed=2), atol=1e-6
        )


@pytest.mark.parametrize("contraction", [0.0, 1.0, 1.2])
def test_contraction_outside_the_open_interval_is_refused(contraction):
    with pytest.raises(ValueError, match=r"`contraction` must lie in \(0, 1\)"):
        KANCell(4, contraction=contraction)
    with pytest.raises(ValueError, match=r"`contraction` must lie in \(0, 1\)"):
        ReconstructionCell(prior(), contraction=contraction)


def prior(spatial_dims=2, **settings):
    torch.manual_seed(0)
    return DnCNN(spatial_dims, 2, 2, 3, 6, **{"residual": False, "spectral_norm": "certified", **settings})


def injection(shape, batch=2):
    generator = torch.Generator().manual_seed(0)
    maps = smooth_coil_maps(shape, 3, generator=generator)[None]
    mask = equispaced_mask(shape[-1], 2, 0.2, generator=generator).reshape(*[1] * (len(shape) + 1), -1)
    operator = MRIOperator(mask, maps, spatial_dims=len(shape))
    kspace = operator(torch.complex(random(batch, *shape, seed=1), random(batch, *shape, seed=2)))
    return Measurement.of(operator, kspace), random(batch, 2, *shape, seed=3)


@pytest.mark.parametrize("shape", [(12, 9), (4, 6, 5)])
@pytest.mark.parametrize("residual", [False, True])
def test_reconstruction_cell_contracts_before_and_after_training(shape, residual):
    cell, x = ReconstructionCell(prior(len(shape), residual=residual), contraction=0.95), injection(shape)
    state = (2, 2, *shape)
    assert 0.3 < observed_factor(cell, x, state) <= 0.95 * (1 + 1e-4)
    train_a_little(cell, x, state)
    assert observed_factor(cell, x, state) <= 0.95 * (1 + 1e-4)


@pytest.mark.parametrize("value", [-20.0, 0.0, 20.0])
def test_learned_numbers_stay_in_their_intervals(value):
    cell = ReconstructionCell(prior(residual=True), contraction=0.9)
    with torch.no_grad():
        for raw in (cell.raw_step_size, cell.raw_relaxation, cell.raw_weight):
            raw.fill_(value)
    lipschitz = cell.prior.certified_lipschitz()
    with torch.no_grad():
        assert 0 <= cell.step_size.item() <= 2
        assert 0 <= cell.relaxation.item() <= 1
        assert cell.weight.item() * (1 - cell.relaxation.item() * (1 - lipschitz)) <= 0.9 * (1 + 1e-6)


def test_reconstruction_cell_is_the_formula():
    cell, (measurement, reference) = ReconstructionCell(prior()), injection((12, 9))
    z = random(2, 2, 12, 9, seed=5)
    with torch.no_grad():
        s, theta, rho = cell.step_size.item(), cell.relaxation.item(), cell.weight.item()
        x = torch.complex(z[:, 0], z[:, 1])
        v = x - s / measurement.curvature.view(-1, 1, 1) * (
            measurement.operator.normal(x) - measurement.back_projection
        )
        v = torch.stack((v.real, v.imag), 1)
        expected = (1 - rho) * reference + rho * ((1 - theta) * v + theta * cell.prior(v))
        assert torch.allclose(cell(z, (measurement, reference)), expected, atol=1e-5)
    assert cell.initial_state((measurement, reference)) is reference


def test_finite_nonzero_gradients_and_reload():
    cell, x = ReconstructionCell(prior()), injection((12, 9))
    z = random(2, 2, 12, 9, seed=5)
    cell(z, x).square().mean().backward()
    for name, parameter in cell.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        cell.raw_step_size.add_(1.0)
    torch.manual_seed(1)
    other = ReconstructionCell(DnCNN(2, 2, 2, 3, 6, residual=False, spectral_norm="certified"))
    assert not torch.allclose(other(z, x), cell(z, x))
    other.load_state_dict(cell.state_dict())
    assert torch.equal(other(z, x), cell(z, x))
    assert torch.equal(copy.deepcopy(cell)(z, x), cell(z, x))


def test_prior_without_a_certificate_is_refused():
    with pytest.raises(TypeError, match=r"Conv2d has none. Use `ConvexRidge.*such as 'cg'"):
        ReconstructionCell(nn.Conv2d(2, 2, 1))
    with pytest.raises(ValueError, match="no finite certified Lipschitz constant"):
        ReconstructionCell(prior(spectral_norm=None, norm="batch"))
    assert isinstance(prior(), CertifiedMap)


@pytest.mark.parametrize("spatial_dims", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("kind", ["kan", "mlp"])
def test_cells_of_vectors_and_maps_contract_before_and_after_training(kind, spatial_dims, kernel_size):
    if spatial_dims == 0 and kernel_size > 1:
        return
    torch.manual_seed(0)
    settings = {"contraction": 0.8, "spatial_dims": spatial_dims, "kernel_size": kernel_size}
    cell = KANCell(3, **settings) if kind == "kan" else MLPCell(3, 7, **settings)
    shape = (2, 3, *[5, 4, 6][:spatial_dims])
    x = random(*shape, seed=99)
    for _ in range(2):
        assert 0.005 < observed_factor(cell, x, shape) <= cell.certified_contraction().factor * (1 + 1e-4)
        assert cell.certified_contraction().factor <= 0.8 * (1 + 1e-4)
        train_a_little(cell, x, shape)


@pytest.mark.parametrize("kind", ["kan", "mlp"])
def test_cells_with_one_tap_are_the_vector_cells_at_every_place(kind):
    torch.manual_seed(0)
    pair = [KANCell(3, spatial_dims=d) if kind == "kan" else MLPCell(3, 4, spatial_dims=d) for d in (0, 2)]
    pair[1].load_state_dict(
        {name: v.view(pair[1].state_dict()[name].shape) for name, v in pair[0].state_dict().items()}
    )
    z, x = random(2, 3, 5, 4, seed=1), random(2, 3, 5, 4, seed=2)
    with torch.no_grad():
        found = pair[1](z, x)
        for row in range(5):
            for column in range(4):
                expected = pair[0](z[:, :, row, column], x[:, :, row, column])
                assert torch.allclose(found[:, :, row, column], expected, atol=1e-5)


def test_mlp_cell_is_the_formula():
    torch.manual_seed(0)
    cell, z, x = MLPCell(4, 6, contraction=0.7), random(3, 4, seed=1), random(3, 4, seed=2)
    first, second = (layer.parametrizations.weight.original.detach().double() for layer in (cell.first, cell.second))
    w1, w2 = (w / torch.linalg.matrix_norm(w, ord=2) for w in (first, second))
    u = z.double() @ w1.T / 1.09984 + cell.first.bias.detach()
    expected = x.double() + 0.7 * (u * u.sigmoid()) @ w2.T
    assert torch.allclose(cell(z, x).double(), expected, atol=1e-5)


def test_even_kernels_and_unknown_dimensions_are_refused():
    for make in (lambda **s: KANCell(3, **s), lambda **s: MLPCell(3, 4, **s)):
        with pytest.raises(ValueError, match="`kernel_size` must be odd"):
            make(spatial_dims=2, kernel_size=2)
        with pytest.raises(ValueError, match="`spatial_dims`"):
            make(spatial_dims=4)
