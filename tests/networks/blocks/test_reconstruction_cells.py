from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from monai_deqkan.networks import certify
from monai_deqkan.networks.blocks import ConjugateGradientCell, GradientCell, Measurement, ProximalCell
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.networks.nets import ConvexRidgeDenoiser, UNetDenoiser
from monai_deqkan.operators import MRIOperator, equispaced_mask, smooth_coil_maps
from monai_deqkan.solvers import AndersonSolver, FixedPointIteration, solve_fixed_point

SHAPES = [(5, 4), (3, 2, 4)]
CELLS = {
    "prox": ProximalCell,
    "grad": GradientCell,
    "cg": lambda prior, **settings: ConjugateGradientCell(prior, cg_rtol=1e-14, cg_max_iter=200, **settings),
}
TIGHT = AndersonSolver(rtol=1e-13, max_iter=1000, on_failure="raise")


class LinearDenoiser(nn.Module):
    """``D x = M x`` with a matrix of a given norm on the two channels of an image."""

    def __init__(self, shape: tuple[int, ...], norm: float = 0.8) -> None:
        super().__init__()
        size = 2 * math.prod(shape)
        matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        self.matrix = nn.Parameter(matrix * (norm / torch.linalg.matrix_norm(matrix, 2)))

    def forward(self, image: Tensor) -> Tensor:
        return (image.flatten(1) @ self.matrix.T).view_as(image)


def scene(shape: tuple[int, ...], batch: int = 2, scale: float = 1.7, share: float = 0.5) -> tuple[Measurement, Tensor]:
    """Return a measurement whose curvature is not one, with a mask of its own per sample, and a reference image."""
    generator = torch.Generator().manual_seed(0)
    maps = scale * smooth_coil_maps(shape, 3, generator=generator).to(torch.complex128)[None].expand(batch, -1, *shape)
    masks = torch.rand(batch, 1, *shape, generator=generator) < share
    masks[(slice(None), 0, *(size // 2 for size in shape))] = True
    operator = MRIOperator(masks, maps, spatial_dims=len(shape))
    kspace = torch.randn(batch, 3, *shape, dtype=torch.complex128, generator=generator) * masks
    reference = torch.randn(batch, 2, *shape, dtype=torch.float64, generator=generator)
    return Measurement.of(operator, kspace), reference


def dense(measurement: Measurement, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``A^H A`` and ``A^H y`` on two channels, ``(B, 2N, 2N)`` and ``(B, 2N)``, and ``L`` ``(B, 1, 1)``."""
    size, columns = math.prod(shape), []
    batch = len(measurement.curvature)
    for index in range(2 * size):
        unit = torch.zeros(batch, size, dtype=torch.complex128)
        unit[:, index % size] = 1.0 if index < size else 1.0j
        image = measurement.operator.normal(unit.view(batch, *shape)).flatten(1)
        columns.append(torch.cat((image.real, image.imag), dim=1))
    back = measurement.back_projection.flatten(1)
    return torch.stack(columns, dim=2), torch.cat((back.real, back.imag), dim=1), measurement.curvature.view(-1, 1, 1)


def step_matrix(cell: nn.Module, normal: Tensor, back: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrix and offset of the affine step with a linear denoiser, by the formulas of the docstrings."""
    eye, denoiser, b = torch.eye(normal.shape[-1]).to(normal), cell.prior.matrix, back[..., None]
    if isinstance(cell, ProximalCell):
        step, theta = cell.step_size, cell.relaxation
        matrix = (1 - theta) * eye + theta * denoiser @ (eye - step / curvature * normal)
        return matrix, theta * denoiser @ (step / curvature * b)
    if isinstance(cell, GradientCell):
        matrix = eye - cell.step_size * (normal / curvature + cell.weight * (eye - denoiser))
        return matrix, cell.step_size / curvature * b
    shift = cell.weight * curvature
    inverse = torch.linalg.inv(normal + shift * eye)
    return inverse @ (shift * denoiser), inverse @ b


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CELLS)
def test_step_and_equilibrium_are_those_of_dense_linear_algebra(name: str, shape: tuple[int, ...]) -> None:
    cell, (measurement, reference) = CELLS[name](LinearDenoiser(shape)).double(), scene(shape)
    with torch.no_grad():
        for parameter in cell.parameters():
            if parameter.ndim == 0:
                parameter.add_(0.3)
        matrix, offset = step_matrix(cell, *dense(measurement, shape))
        expected = (matrix @ reference.flatten(1)[..., None] + offset)[..., 0].view_as(reference)
        torch.testing.assert_close(cell(reference, (measurement, reference)), expected, rtol=1e-9, atol=1e-10)
        eye = torch.eye(matrix.shape[-1]).to(matrix)
        star = torch.linalg.solve(eye - matrix, offset)[..., 0].view_as(reference)
        found = DEQLayer(cell, TIGHT)((measurement, reference))
        torch.testing.assert_close(found, star, rtol=1e-9, atol=1e-9)
        # Other samples of the batch do not matter.
        rows = torch.tensor([1])
        alone = DEQLayer(cell, TIGHT)((measurement.take(rows), reference[rows]))
        torch.testing.assert_close(alone, star[rows], rtol=1e-9, atol=1e-9)


def test_gradient_and_cg_form_have_one_equilibrium_and_relaxation_does_not_move_that_of_prox() -> None:
    shape = SHAPES[0]
    measurement, reference = scene(shape)
    found = {}
    for name in ("grad", "cg"):
        cell = CELLS[name](LinearDenoiser(shape), weight=0.4).double()
        found[name] = DEQLayer(cell, TIGHT)((measurement, reference)).detach()
    torch.testing.assert_close(found["grad"], found["cg"], rtol=1e-8, atol=1e-8)
    normal, back, curvature = dense(measurement, shape)
    prior = LinearDenoiser(shape).matrix.detach()
    matrix = normal + 0.4 * curvature * (torch.eye(len(prior)).to(prior) - prior)  # (A^H A + R) x = A^H y
    torch.testing.assert_close(found["cg"].flatten(1), torch.linalg.solve(matrix, back), rtol=1e-7, atol=1e-8)
    cell = ProximalCell(LinearDenoiser(shape)).double()
    stars = []
    for raw in (-1.0, 3.0):
        nn.init.constant_(cell.raw_relaxation, raw)
        stars.append(DEQLayer(cell, TIGHT)((measurement, reference)).detach())
    torch.testing.assert_close(stars[0], stars[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CELLS)
def test_implicit_gradient_is_that_of_the_closed_form(name: str, shape: tuple[int, ...]) -> None:
    cell, (measurement, reference) = CELLS[name](LinearDenoiser(shape)).double(), scene(shape)
    weight = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix, offset = step_matrix(cell, *dense(measurement, shape))
    star = torch.linalg.solve(torch.eye(matrix.shape[-1]).to(matrix) - matrix, offset)[..., 0].view_as(reference)
    names = [name for name, parameter in cell.named_parameters()]
    parameters = list(cell.parameters())
    expected = torch.autograd.grad((star * weight).sum(), parameters)
    layer = DEQLayer(cell, TIGHT, ("implicit", {"solver": TIGHT}))
    found = torch.autograd.grad((layer((measurement, reference)) * weight).sum(), parameters)
    for label, one, other in zip(names, found, expected, strict=True):
        if label == "raw_relaxation":  # has no influence on the equilibrium
            assert abs(float(one)) < 1e-8
            continue
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=label)


@pytest.mark.parametrize("name", CELLS)
def test_gradient_of_a_step_by_finite_differences(name: str) -> None:
    shape = (3, 2)
    cell, (measurement, reference) = CELLS[name](LinearDenoiser(shape)).double(), scene(shape)
    scalars = [parameter for parameter in cell.parameters() if parameter.ndim == 0]

    def step(z: Tensor, *values: Tensor) -> Tensor:
        names = [key for key, parameter in cell.named_parameters() if parameter.ndim == 0]
        return torch.func.functional_call(cell, dict(zip(names, values, strict=True)), (z, (measurement, reference)))

    inputs = (reference.clone().requires_grad_(), *(scalar.detach().clone().requires_grad_() for scalar in scalars))
    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs)


@pytest.mark.parametrize("weight", [0.05, 1.0])
@pytest.mark.parametrize("norm", [0.3, 0.99])
def test_gradient_form_contracts_as_its_docstring_says(weight: float, norm: float) -> None:
    shape = SHAPES[0]
    measurement, _ = scene(shape, share=0.1)
    cell = GradientCell(LinearDenoiser(shape, norm), weight=weight).double().requires_grad_(False)
    normal, back, curvature = dense(measurement, shape)
    step_size, lam = float(cell.step_size), float(cell.weight)
    assert lam == pytest.approx(weight)
    matrix, _ = step_matrix(cell, normal, back, curvature)
    smallest = float((torch.linalg.eigvalsh(normal) / curvature[..., 0]).min())
    assert smallest < 1e-9  # undersampled
    factor = 1 - step_size * (smallest + lam * (1 - norm))
    norms = torch.linalg.matrix_norm(matrix, 2)
    assert float(norms.max()) <= factor + 1e-12
    # With a denoiser that shrinks everything alike, the factor is reached.
    with torch.no_grad():
        cell.prior.matrix.copy_(norm * torch.eye(len(cell.prior.matrix), dtype=torch.float64))
    matrix, _ = step_matrix(cell, normal, back, curvature)
    assert float(torch.linalg.matrix_norm(matrix, 2).max()) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("raw", [-1e4, -20.0, 0.0, 20.0, 1e4])
def test_constraints_hold_after_wild_optimizer_steps(raw: float) -> None:
    prior = ConvexRidgeDenoiser(2, num_layers=1, features=4)
    prox, grad = ProximalCell(prior), GradientCell(prior)
    cg = ConjugateGradientCell(prior, contraction=0.9)
    for cell in (prox, grad, cg):
        for parameter in cell.requires_grad_(False).parameters(recurse=False):
            parameter.fill_(raw)
    assert 0 <= float(prox.step_size) <= 2
    assert 0 <= float(prox.relaxation) <= 1
    assert 0 <= float(grad.weight) < math.inf
    assert 0 <= float(grad.step_size) * (1 + float(grad.weight)) <= 1 + 1e-6
    assert 0 <= float(cg.weight) < math.inf
    assert 0 <= float(cg.step_weight) <= 0.9
    assert cg.certified_contraction().factor <= 0.9


def test_constraints_hold_after_an_optimizer_step_of_any_size() -> None:
    measurement, reference = scene((6, 5))
    for name in CELLS:
        cell = CELLS[name](ConvexRidgeDenoiser(2, num_layers=1, features=4)).double()
        optimizer = torch.optim.SGD(cell.parameters(recurse=False), lr=1e6)
        (cell(reference, (measurement, reference)) - reference).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            if name == "prox":
                assert 0 <= float(cell.step_size) <= 2
                assert 0 <= float(cell.relaxation) <= 1
            elif name == "grad":
                assert 0 <= float(cell.step_size) <= 1 / (1 + float(cell.weight))
            else:
                assert 0 <= float(cell.weight) < math.inf
            assert torch.isfinite(cell(reference, (measurement, reference))).all()


def test_certified_cg_form_contracts_as_it_says_and_the_others_promise_nothing() -> None:
    shape = (8, 6)
    measurement, reference = scene(shape)
    torch.manual_seed(0)
    prior = ConvexRidgeDenoiser(2, num_layers=2, features=4, threshold=5.0)
    cell = ConjugateGradientCell(prior, contraction=0.9).double()
    bound = cell.certified_contraction((measurement, reference))
    assert bound.factor == pytest.approx(0.9 * float(torch.sigmoid(torch.tensor(8.0))))
    certificate = certify(cell, (measurement, reference))
    assert certificate.is_certified
    assert 0.3 < certificate.largest_observed <= bound.factor
    # f(z) is the mix of the reference image and the step of the form without a certificate.
    plain = ConjugateGradientCell(prior).double()
    step = plain(reference * 0.5, (measurement, reference))
    expected = reference + cell.step_weight * (step - reference)
    torch.testing.assert_close(cell(reference * 0.5, (measurement, reference)), expected)
    for other in (plain, ProximalCell(prior), GradientCell(prior)):
        assert other.certified_contraction().factor == math.inf
        assert "need not exist" in other.certified_contraction().assumptions[0]


@pytest.mark.parametrize("weight", [1e-4, 0.01, 0.03, 1.0])
def test_conjugate_gradients_leave_less_than_their_bound(weight: float) -> None:
    shape = (12, 10)
    measurement, reference = scene(shape)
    denoiser, left = LinearDenoiser(shape), {}
    normal, back, curvature = dense(measurement, shape)
    for dtype in (torch.float64, torch.float32):
        cell = ConjugateGradientCell(denoiser, weight=weight).double()
        limits = cell.cg_limits(dtype)
        cell.cg_limits = lambda _, limits=limits: limits  # those of float32 without its rounding
        matrix, offset = step_matrix(cell, normal, back, curvature)
        exact = (matrix @ reference.flatten(1)[..., None] + offset)[..., 0].view_as(reference)
        with torch.no_grad():
            error = (cell(reference, (measurement, reference)) - exact).flatten(1).norm(dim=1)
            left[dtype] = float((error / (exact - denoiser(reference)).flatten(1).norm(dim=1)).max())
        assert left[dtype] <= cell.cg_error(dtype)
    assert left[torch.float64] < 1e-2 * left[torch.float32]
    if weight > 1e-3:  # as near as solutions to 1e-7 need
        assert left[torch.float64] < 1e-6


@pytest.mark.parametrize("name", CELLS)
def test_equilibrium_of_an_untold_denoiser_scales_with_the_data(name: str) -> None:
    torch.manual_seed(0)
    prior = UNetDenoiser(2, features=(4, 6), num_blocks=1, blind=True)
    cell, (measurement, reference) = CELLS[name](prior).double(), scene((6, 5))
    scaled = Measurement(measurement.operator, 3 * measurement.back_projection, measurement.curvature)
    with torch.no_grad():
        once = cell(reference, (measurement, reference))
        torch.testing.assert_close(cell(3 * reference, (scaled, 3 * reference)), 3 * once)


@pytest.mark.parametrize("name", CELLS)
def test_noise_level_is_learned_where_the_prior_asks_for_it(name: str) -> None:
    torch.manual_seed(0)
    prior = UNetDenoiser(2, features=(4, 6), num_blocks=1)
    cell, (measurement, reference) = CELLS[name](prior, noise_level=0.2).double(), scene((6, 5))
    assert float(cell.noise_level.detach()) == pytest.approx(0.2)
    torch.testing.assert_close(cell.denoise(reference, measurement), prior(reference, 0.2))
    cell(reference, (measurement, reference)).square().sum().backward()
    assert float(cell.raw_noise_level.grad.abs()) > 0
    blind = CELLS[name](UNetDenoiser(2, features=(4, 6), num_blocks=1, blind=True))
    assert blind.noise_level is None
    assert "raw_noise_level" not in dict(blind.named_parameters())


@pytest.mark.parametrize("name", CELLS)
def test_map_sets_are_denoised_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    shape = (6, 5)
    prior = UNetDenoiser(2, features=(4, 6), num_blocks=1, blind=True)
    cell = CELLS[name](prior).double()
    # Sets that do not overlap are reconstructions of their own.
    maps = torch.zeros(1, 2, 2, *shape, dtype=torch.complex128)
    maps[:, 0, 0], maps[:, 1, 1] = 1.0, 1.0
    mask = equispaced_mask(shape[-1], 2, 0.3, generator=torch.Generator().manual_seed(0)).view(1, 1, 1, -1)
    kspace = torch.randn(2, 2, *shape, dtype=torch.complex128) * mask
    both = Measurement.of(MRIOperator(mask, maps), kspace)
    z = torch.randn(2, 2, 2, *shape, dtype=torch.float64)
    expected = torch.stack([prior(z[:, :, index]) for index in range(2)], dim=2)
    torch.testing.assert_close(cell.denoise(z, both), expected)
    together = cell(z, (both, z))
    for index in range(2):
        alone = Measurement.of(MRIOperator(mask), kspace[:, index : index + 1])
        torch.testing.assert_close(together[:, :, index], cell(z[:, :, index], (alone, z[:, :, index])))


@pytest.mark.parametrize("name", CELLS)
def test_state_dict_round_trip(name: str, tmp_path) -> None:
    shape = SHAPES[0]
    torch.manual_seed(0)
    one, (measurement, reference) = CELLS[name](LinearDenoiser(shape)).double(), scene(shape)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.1)
    two = CELLS[name](LinearDenoiser(shape)).double()
    assert not torch.equal(one(reference, (measurement, reference)), two(reference, (measurement, reference)))
    torch.save(one.state_dict(), tmp_path / "cell.pt")
    two.load_state_dict(torch.load(tmp_path / "cell.pt", weights_only=True))
    assert torch.equal(one(reference, (measurement, reference)), two(reference, (measurement, reference)))


def test_start_is_the_reference_image_and_picard_reaches_what_anderson_reaches() -> None:
    shape = SHAPES[0]
    measurement, reference = scene(shape)
    for name in CELLS:
        cell = CELLS[name](LinearDenoiser(shape, 0.5)).double().requires_grad_(False)
        assert cell.initial_state((measurement, reference)) is reference
        plain = solve_fixed_point(
            cell, reference, FixedPointIteration(rtol=1e-12, max_iter=2000), (measurement, reference)
        )
        torch.testing.assert_close(plain.z, DEQLayer(cell, TIGHT)((measurement, reference)), rtol=1e-8, atol=1e-8)


def test_bad_arguments_are_named() -> None:
    prior = LinearDenoiser((2, 2))
    with pytest.raises(TypeError, match="`prior` must be a module on two channels; got int"):
        ProximalCell(3)
    for build, match in (
        (lambda: ProximalCell(prior, noise_level=0.0), "noise_level"),
        (lambda: GradientCell(prior, weight=0.0), "weight"),
        (lambda: ConjugateGradientCell(prior, weight=-1.0), "weight"),
        (lambda: ConjugateGradientCell(prior, cg_rtol=0.0), "cg_rtol"),
        (lambda: ConjugateGradientCell(prior, cg_max_iter=0), "cg_max_iter"),
        (lambda: ConjugateGradientCell(ConvexRidgeDenoiser(2), contraction=1.0), "contraction"),
        (lambda: ConjugateGradientCell(prior, contraction=0.9), "prior with a certified Lipschitz constant"),
    ):
        with pytest.raises(ValueError, match=match):
            build()
