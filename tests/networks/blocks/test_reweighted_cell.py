from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_deqkan.losses import JacobianLoss
from monai_deqkan.networks.blocks import Measurement, ReweightedCell
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.networks.nets import DEQReconstructor, DnCNN, WeaklyConvexRidgeDenoiser
from monai_deqkan.operators import LinearOperator, MRIOperator, smooth_coil_maps
from monai_deqkan.solvers import AndersonSolver

SHAPES = [(6, 7), (4, 3, 5)]
TIGHT = AndersonSolver(rtol=1e-11, max_iter=500, on_failure="raise")


def build(dims: int = 2, tail: float = 20.0, **settings) -> ReweightedCell:
    torch.manual_seed(0)
    prior = WeaklyConvexRidgeDenoiser(dims, (4, 3), kernel_size=3, threshold=0.5, tail=tail)
    with torch.no_grad():  # cosines have equal norms at several frequencies: the largest is not smooth there
        for kernel in prior.raw_kernels:
            kernel.add_(0.1 * torch.randn_like(kernel))
    return ReweightedCell(prior, **{"cg_rtol": 1e-6, "cg_max_iter": 20, **settings}).double()


def scene(shape: tuple[int, ...], batch: int = 2, share: float = 0.5):
    """Return a measurement whose curvature is not one, its k-space, and a reference image."""
    generator = torch.Generator().manual_seed(0)
    maps = 1.7 * smooth_coil_maps(shape, 3, generator=generator).to(torch.complex128)[None].expand(batch, -1, *shape)
    masks = torch.rand(batch, 1, *shape, generator=generator) < share
    masks[(slice(None), 0, *(size // 2 for size in shape))] = True
    kspace = torch.randn(batch, 3, *shape, dtype=torch.complex128, generator=generator) * masks
    operator = MRIOperator(masks, maps, spatial_dims=len(shape))
    reference = torch.randn(batch, 2, *shape, dtype=torch.float64, generator=generator)
    return Measurement.of(operator, kspace), kspace, reference


@pytest.mark.parametrize("shape", SHAPES)
def test_no_step_raises_the_energy_however_early_its_solve_ends(shape):
    measurement, kspace, z = scene(shape)
    for iterations in (1, 20):  # five times as many in float64
        cell = build(len(shape), tail=2.0, cg_max_iter=iterations)
        with torch.no_grad():
            image, energies = z, [cell.energy(z, measurement, kspace)]
            for _ in range(10):
                image = cell(image, (measurement, z))
                energies.append(cell.energy(image, measurement, kspace))
        falls = torch.stack(energies).diff(dim=0)
        assert bool((falls <= 1e-10).all())
        assert bool((falls[0] < 0).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_equilibrium_is_a_stationary_point_of_the_energy(shape):
    measurement, kspace, reference = scene(shape)
    cell = build(len(shape))
    z = DEQLayer(cell, TIGHT)((measurement, reference)).detach().requires_grad_()
    energy = cell.energy(z, measurement, kspace)
    (slope,) = torch.autograd.grad(energy.sum(), z)
    (start,) = torch.autograd.grad(cell.energy(reference.requires_grad_(), measurement, kspace).sum(), reference)
    assert float(slope.norm()) < 1e-8 * float(start.norm())
    rows = torch.tensor([1])
    alone = DEQLayer(cell, TIGHT)((measurement.take(rows), reference.detach()[rows]))
    torch.testing.assert_close(alone, z[rows], rtol=1e-8, atol=1e-8)


def test_diagonals_make_the_solves_shorter_and_ones_will_do(monkeypatch):
    shape = (24, 20)
    measurement, kspace, z = scene(shape, batch=1, share=0.4)
    z = 10 * z  # weights from one to next to nothing
    energies, ones = {}, (torch.ones(1, *shape).double(),) * 2
    for known in (True, False):
        cell = build(tail=2.0, cg_max_iter=4)
        if not known:
            monkeypatch.setattr(cell.prior, "diagonals", lambda *_: ones)
            monkeypatch.setattr(measurement.operator, "normal_diagonals", lambda: ones)
        with torch.no_grad():
            energies[known] = [float(cell.energy(z, measurement, kspace))]
            energies[known].append(float(cell.energy(cell(z, (measurement, z)), measurement, kspace)))
    assert energies[True][1] < energies[False][1] < energies[False][0]


def test_an_operator_without_maps_or_of_another_kind():
    class Plain(LinearOperator):
        def __init__(self, inner):
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

        def adjoint(self, y):
            return self.inner.adjoint(y)

        def take(self, rows):
            return Plain(self.inner.take(rows))

    torch.manual_seed(0)
    operator = MRIOperator(torch.tensor([True, False, True, True, False, True, True]).view(1, 1, 1, 7))
    z = torch.randn(2, 2, 6, 7)
    kspace = operator(torch.randn(2, 6, 7, dtype=torch.complex64))
    cell = build(cg_rtol=1e-6, cg_max_iter=60).float()
    bare = Measurement.of(operator, kspace)
    with torch.no_grad():
        found = cell(z, (bare, z))
        other = cell(z, (Measurement(Plain(operator), bare.back_projection, bare.curvature), z))
    torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-4)


def test_gradient_of_the_equilibrium_by_finite_differences():
    measurement, _, reference = scene(SHAPES[0])
    measurement = Measurement(
        measurement.operator, measurement.back_projection, measurement.curvature, torch.tensor([0.01, 0.02]).double()
    )
    cell = build()
    weight = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    layer = DEQLayer(cell, TIGHT, ("implicit", {"solver": TIGHT}))

    def loss():
        return (layer((measurement, reference)) * weight).sum()

    loss().backward()
    # Only its own denoising uses these.
    unused = cell.prior.raw_level_weights
    assert unused.grad is None or not unused.grad.any()
    used = [parameter for parameter in cell.parameters() if parameter is not unused]
    directions, found, step = [torch.randn_like(parameter) for parameter in used], [], 1e-5
    expected = sum(float((p.grad * direction).sum()) for p, direction in zip(used, directions, strict=True))
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(used, directions, strict=True):
                parameter.add_(sign * step * direction)
            found.append(float(loss()))
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(expected, rel=1e-5)


def test_maps_that_do_not_fit_make_the_energy_count_for_more():
    measurement, *_ = scene(SHAPES[0])
    cell = build(weight=0.5, unit_misfit=0.01)
    assert cell.weights(measurement).tolist() == pytest.approx([0.5])
    known = Measurement(
        measurement.operator, measurement.back_projection, measurement.curvature, torch.tensor([0.0, 0.02]).double()
    )
    assert cell.weights(known).tolist() == pytest.approx([0.5, 2.5])
    assert cell.weights(known.take(torch.tensor([1]))).tolist() == pytest.approx([2.5])
    useless = Measurement(
        measurement.operator, measurement.back_projection, measurement.curvature, torch.tensor([0.5, 1.0]).double()
    )
    assert cell.weights(useless).tolist() == pytest.approx([5.0, 5.0])  # ten times at most


def test_a_jacobian_penalty_says_that_it_cannot_be():
    measurement, _, reference = scene((6, 7))
    network = DEQReconstructor(2, form="reweighted", features=(4, 3)).double()
    penalty = JacobianLoss()(network.equilibrium.cell, reference.requires_grad_(), (measurement, reference.detach()))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        penalty.backward(retain_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(penalty, list(network.parameters()), allow_unused=True)


def test_products_with_the_jacobian_from_both_sides():
    measurement, _, reference = scene((4, 3), batch=1)
    cell = build()
    z = reference.requires_grad_()
    image = cell(z, (measurement, z.detach()))
    jacobian = torch.autograd.functional.jacobian(lambda u: cell(u, (measurement, z.detach())), z).view(24, 24)
    u = torch.zeros_like(image).requires_grad_()
    (back,) = torch.autograd.grad(image, z, u, create_graph=True)  # J^T u, linear in u: its derivative gives J v
    v = torch.randn_like(z)
    (forward,) = torch.autograd.grad(back, u, v)
    torch.testing.assert_close(forward.flatten(), jacobian @ v.flatten(), rtol=1e-5, atol=1e-7)


def test_nothing_is_certified_and_wrong_priors_are_refused():
    assert build().certified_contraction().factor == float("inf")
    with pytest.raises(TypeError, match="energy"):
        ReweightedCell(DnCNN(2, 2, 2, num_layers=3, features=4))
    with pytest.raises(TypeError, match="energy"):
        ReweightedCell(nn.Identity())
    for settings in ({"weight": 0.0}, {"unit_misfit": -1.0}, {"cg_rtol": 0.0}, {"cg_max_iter": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            build(**settings)
