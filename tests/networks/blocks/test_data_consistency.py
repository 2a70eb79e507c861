import pytest
import torch

from monai_deqkan.networks.blocks import Measurement, gradient_step, proximal_step
from monai_deqkan.operators import MRIOperator, equispaced_mask, smooth_coil_maps


def scene(dtype=torch.complex128, coils=3, shape=(10, 9)):
    generator = torch.Generator().manual_seed(0)
    maps = smooth_coil_maps(shape, coils, generator=generator).to(dtype).expand(2, -1, *shape)
    mask = equispaced_mask(shape[-1], 2, 0.2, generator=generator).reshape(1, 1, *[1] * (len(shape) - 1), -1)
    operator = MRIOperator(mask, maps, spatial_dims=len(shape))
    kspace = torch.randn(2, coils, *shape, dtype=dtype, generator=generator) * mask
    return operator, kspace


def channels(image):
    return torch.stack((image.real, image.imag), 1)


@pytest.mark.parametrize("shape", [(10, 9), (4, 5, 6)])
def test_step_is_the_gradient_of_the_data_term(shape):
    operator, kspace = scene(shape=shape)
    measurement = Measurement.of(operator, kspace)
    x = torch.randn(2, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    misfit = operator(torch.complex(x[:, 0], x[:, 1])) - kspace
    (gradient,) = torch.autograd.grad(0.5 * misfit.abs().square().sum(), x)
    for step_size in (0.7, torch.tensor(1.3)):
        expected = x - float(step_size) * gradient / measurement.curvature.view(-1, *[1] * (x.ndim - 1))
        assert torch.allclose(gradient_step(x, measurement, step_size), expected, atol=1e-7)


def test_curvature_bounds_the_largest_eigenvalue():
    operator, kspace = scene()
    x = torch.randn(2, 10, 9, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        x = operator.normal(x)
        norm = x.flatten(1).norm(dim=1)
        x = x / norm.view(-1, 1, 1)
    curvature = Measurement.of(operator, kspace).curvature
    assert bool((norm <= curvature * (1 + 1e-9)).all())
    assert bool((norm >= 0.5 * curvature).all())


@pytest.mark.parametrize("step_size", [0.0, 0.5, 1.0, 1.9, 2.0])
def test_nonexpansive_for_step_sizes_up_to_two(step_size):
    operator, kspace = scene()
    measurement = Measurement.of(operator, kspace)
    a, b = (torch.randn(2, 2, 10, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    moved = gradient_step(a, measurement, step_size) - gradient_step(b, measurement, step_size)
    assert bool((moved.flatten(1).norm(dim=1) <= (a - b).flatten(1).norm(dim=1) * (1 + 1e-9)).all())


def test_image_that_explains_the_data_stays():
    operator, _ = scene()
    image = torch.randn(2, 10, 9, dtype=torch.complex128, generator=torch.Generator().manual_seed(3))
    measurement = Measurement.of(operator, operator(image))
    assert torch.allclose(gradient_step(channels(image), measurement, 1.0), channels(image), atol=1e-9)


def test_rows_of_a_measurement():
    operator, kspace = scene()
    measurement = Measurement.of(operator, kspace)
    x = torch.randn(2, 2, 10, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([1])
    whole = gradient_step(x, measurement, 0.8)
    assert torch.allclose(gradient_step(x[rows], measurement.take(rows), 0.8), whole[rows], atol=1e-12)


def test_empty_kspace_does_not_divide_by_zero():
    operator = MRIOperator(torch.ones(1, 1, 1, 4, dtype=torch.bool), torch.zeros(1, 2, 4, 4, dtype=torch.complex64))
    measurement = Measurement.of(operator, torch.zeros(1, 2, 4, 4, dtype=torch.complex64))
    x = torch.ones(1, 2, 4, 4)
    assert torch.equal(gradient_step(x, measurement, 1.0), x)


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
def test_proximal_step_is_the_minimizer(shape):
    operator, kspace = scene(shape=shape)
    measurement = Measurement.of(operator, kspace)
    x = torch.randn(2, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor(0.3, dtype=torch.float64)
    found = proximal_step(x, measurement, weight, rtol=1e-14, max_iter=200).requires_grad_()
    misfit = operator(torch.complex(found[:, 0], found[:, 1])) - kspace
    pull = (weight * measurement.curvature).view(-1, *[1] * (x.ndim - 1)) * (found - x).square()
    # The gradient of what it minimizes is zero there, and far from zero where it starts.
    (gradient,) = torch.autograd.grad(0.5 * misfit.abs().square().sum() + 0.5 * pull.sum(), found)
    assert float(gradient.abs().max()) < 1e-10
    found = found.detach()
    assert float((found - x).abs().max()) > 0.1
    rough = proximal_step(x, measurement, weight, rtol=1e-2, max_iter=200)
    none = proximal_step(x, measurement, weight, rtol=1e-14, max_iter=1)
    errors = [float((other - found).norm() / found.norm()) for other in (rough, none)]
    assert 1e-9 < errors[0] < 0.1
    assert errors[1] > 1e-3


def test_proximal_step_is_firmly_nonexpansive_for_any_weight():
    operator, kspace = scene()
    measurement = Measurement.of(operator, kspace)
    a, b = (torch.randn(2, 2, 10, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    for weight in (1e-3, 1.0, 1e3):
        moved = [
            proximal_step(image, measurement, torch.tensor(weight, dtype=torch.float64), rtol=1e-12, max_iter=500)
            for image in (a, b)
        ]
        difference = (moved[0] - moved[1]).flatten(1)
        inner = (difference * (a - b).flatten(1)).sum(dim=1)
        assert bool((difference.square().sum(dim=1) <= inner * (1 + 1e-9)).all())


def test_memory_of_the_proximal_step_does_not_grow_with_its_iterations():
    operator, kspace = scene()
    measurement = Measurement.of(operator, kspace)
    image = torch.randn(2, 2, 10, 9, dtype=torch.float64).requires_grad_()
    kept = []
    for max_iter in (2, 40):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            proximal_step(image, measurement, torch.tensor(0.1), rtol=1e-14, max_iter=max_iter)
        kept.append(sum(saved))
    assert kept[0] == kept[1] > 0
