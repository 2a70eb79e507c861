from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from monai_deqkan.networks.nets import WeaklyConvexRidgeDenoiser

SHAPES = [(2, (13, 18)), (2, (16, 16)), (3, (7, 9, 8))]


def build(spatial_dims: int = 2, **settings) -> WeaklyConvexRidgeDenoiser:
    torch.manual_seed(0)
    chosen = {"features": (6, 5, 3), "kernel_size": 3, "threshold": 0.3, "tail": 2.0, **settings}
    denoiser = WeaklyConvexRidgeDenoiser(spatial_dims, **chosen).double()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return denoiser


def image(spatial_dims: int, space: tuple[int, ...], batch: int = 2, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(batch, 2, *space, dtype=torch.float64, generator=generator)


def plain_energy(denoiser: WeaklyConvexRidgeDenoiser, x: torch.Tensor) -> torch.Tensor:
    """The energy by ordinary dilated convolutions and a numerical integral of the potentials' derivative."""
    dims = denoiser.spatial_dims
    convolve = F.conv2d if dims == 2 else F.conv3d
    total = torch.zeros(len(x), dtype=x.dtype)
    blurred = x.flatten(0, 1).unsqueeze(1)
    for index, kernel in enumerate(denoiser.kernels()):
        spacing = 2**index
        if index:
            for axis in range(dims):
                ones = [3 if other == axis else 1 for other in range(dims)]
                taps = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype).view(1, 1, *ones)
                gap = [spacing // 2 if other == axis else 1 for other in range(dims)]
                pad = [spacing // 2 if other == axis else 0 for other in range(dims)]
                blurred = convolve(blurred, taps, padding=pad, dilation=gap)
        # Whole blocks of interleaved pixels, see `_split`.
        padded = F.pad(blurred, [end for n in reversed(x.shape[2:]) for end in (0, -n % spacing)])
        response = convolve(padded, kernel, padding=spacing * (kernel.shape[-1] // 2), dilation=spacing)
        size = response.unflatten(0, (-1, 2)).square().sum(1).sqrt()
        tau = (10 * denoiser.raw_thresholds[index]).exp().view(-1, *[1] * dims)
        beta = (1 + (10 * denoiser.raw_tails[index]).exp()).view(-1, *[1] * dims)
        nodes = (torch.arange(4000, dtype=x.dtype) + 0.5) / 4000
        for node in nodes:  # midpoint rule from zero to the size
            t = node * size
            quotient = 1 / ((t / tau).square().clamp_min(1).sqrt() * (1 + (t / (beta * tau)).square()).sqrt())
            slope = t * quotient.clamp_min(denoiser.floor)
            total = total + (slope * size / 4000).flatten(1).sum(1)
    return total


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
def test_energy_is_that_of_its_definition(floor):
    denoiser = build(features=(2, 2), floor=floor)
    x = image(2, (5, 7))
    torch.testing.assert_close(denoiser.energy(x), plain_energy(denoiser, x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("dims", "space"), SHAPES)
def test_gradient_curvature_and_energy_agree(dims, space):
    denoiser, x = build(dims, floor=0.1), image(dims, space).requires_grad_()
    (expected,) = torch.autograd.grad(denoiser.energy(x).sum(), x)
    kernels = denoiser.kernels()
    torch.testing.assert_close(denoiser.gradient(x, kernels), expected)
    torch.testing.assert_close(denoiser.curvature(x, kernels, denoiser.weights(x, kernels)), expected)
    with torch.no_grad():  # writes in place there
        torch.testing.assert_close(denoiser.gradient(x, kernels), expected)


@pytest.mark.parametrize(("dims", "space"), SHAPES)
def test_curvature_is_self_adjoint_between_zero_and_one(dims, space):
    denoiser, x = build(dims), image(dims, space)
    with torch.no_grad():
        kernels = denoiser.kernels()
        weights = denoiser.weights(x, kernels)
        assert all(float(w.min()) > 0 and float(w.max()) <= 1 for w in weights)
        a, b = torch.randn_like(x), torch.randn_like(x)
        left, right = (a * denoiser.curvature(b, kernels, weights)).sum(), (b * denoiser.curvature(a, kernels, weights))
        torch.testing.assert_close(left, right.sum())
        assert float((a * denoiser.curvature(a, kernels, weights)).sum()) > 0
        ones = [torch.ones_like(w) for w in weights]
        for _ in range(100):
            a = denoiser.curvature(a, kernels, ones)
            norm = a.norm()
            a = a / norm
        # The norm is found on a grid of frequencies: one up to that.
        assert 0.3 < float(norm) < 1.02


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_quadratic_functions_bound_the_energy_and_touch_it(floor):
    denoiser, x = build(floor=floor), image(2, (12, 12))
    with torch.no_grad():
        kernels = denoiser.kernels()
        weights = denoiser.weights(x, kernels)

        def quadratic(z):
            return 0.5 * (z * denoiser.curvature(z, kernels, weights)).flatten(1).sum(1)

        start = denoiser.energy(x) - quadratic(x)
        for scale in (0.1, 1.0, 5.0):
            z = x + scale * torch.randn_like(x)
            assert bool((denoiser.energy(z) <= quadratic(z) + start + 1e-10).all())


@pytest.mark.parametrize(("dims", "space"), [(2, (22, 19)), (3, (8, 9, 10))])
def test_diagonals_are_about_those_of_the_curvature(dims, space):
    denoiser, x = build(dims, threshold=0.3), image(dims, space)
    kernels = denoiser.kernels()
    weights = denoiser.weights(x, kernels)
    found = denoiser.diagonals(x, kernels, weights)
    axes, number = tuple(range(-dims, 0)), math.prod(space)
    units = torch.eye(number, dtype=torch.complex128).view(number, *space)
    for sample in range(len(x)):
        own = [weight.unflatten(0, (len(x), -1))[sample] for weight in weights]
        for waves, diagonal in zip((units, torch.fft.ifftn(units, dim=axes, norm="ortho")), found, strict=True):
            rows = torch.arange(0, number, 7)  # some of them
            back = [
                denoiser.curvature(torch.stack((w.real, w.imag)).unsqueeze(0).to(x.dtype), kernels, own)[0]
                for w in waves[rows]
            ]
            expected = torch.stack([
                (w.conj() * torch.complex(*b.unbind())).sum().real for w, b in zip(waves[rows], back, strict=True)
            ])  # fmt: skip
            assert diagonal.shape == (len(x), *space)
            error = (diagonal[sample].flatten()[rows] - expected).norm() / expected.norm()
            assert float(error.detach()) < (0.2 if dims == 2 else 0.6)  # the border takes much of a small volume


def test_energy_of_small_responses_is_not_lost_in_rounding():
    denoiser, x = build(tail=1e4).float(), 1e-3 * image(2, (16, 16)).float()
    precise = build(tail=1e4).double()
    precise.load_state_dict(denoiser.state_dict())
    for factor in (1.0, 1e3, 1e6):
        torch.testing.assert_close(
            denoiser.energy(factor * x).double(), precise.energy(factor * x.double()), rtol=1e-5, atol=0.0
        )


def test_phase_does_not_matter():
    denoiser, x = build(), image(2, (10, 12))
    angle = 0.7
    turned = torch.stack(
        (x[:, 0] * math.cos(angle) - x[:, 1] * math.sin(angle), x[:, 0] * math.sin(angle) + x[:, 1] * math.cos(angle)),
        dim=1,
    )
    torch.testing.assert_close(denoiser.energy(turned), denoiser.energy(x))
    clean, other = denoiser(x, 0.1), denoiser(turned, 0.1)
    torch.testing.assert_close(other.norm(dim=1), clean.norm(dim=1))


def test_constants_cost_only_at_the_border_and_large_steps_little():
    denoiser = build(features=4, threshold=0.05, floor=0.0)
    flat = torch.ones(1, 2, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        slope = denoiser.gradient(flat, denoiser.kernels())
    assert float(slope[:, :, 8:-8, 8:-8].abs().max()) < 1e-12
    # Logarithmic tails: a step a hundred times as high costs less than twenty times as much, not a hundred times.
    step = torch.zeros(1, 2, 40, 40, dtype=torch.float64)
    step[:, 0, 10:30, 10:30] = 3.0
    with torch.no_grad():
        assert float(denoiser.energy(100 * step)) < 20 * float(denoiser.energy(step))
        # With a floor the largest ones cost their square again.
        held = build(features=4, threshold=0.05, floor=1e-3)
        assert float(held.energy(1e6 * step)) == pytest.approx(100 * float(held.energy(1e5 * step)), rel=0.01)


def test_denoises_better_with_more_steps_and_each_sample_by_its_level():
    denoiser = WeaklyConvexRidgeDenoiser(2, (16, 8))
    torch.manual_seed(0)
    clean = torch.zeros(2, 2, 32, 32)
    clean[:, 0, 8:24, 8:24] = 1.0
    level = torch.tensor([0.03, 0.1])
    noisy = clean + level.view(2, 1, 1, 1) * torch.randn_like(clean)
    with torch.no_grad():
        both = denoiser(noisy, noise_level=level)
        error, noise = ((a - clean).square().flatten(1).mean(1) for a in (both, noisy))
        assert bool((error < 0.9 * noise).all())
        torch.testing.assert_close(both[1:], denoiser(noisy[1:], noise_level=0.1))
        kernels = denoiser.kernels()
        weight = denoiser.level_weight(level).view(2, 1, 1, 1)
        slopes = []
        for steps in (3, 30):
            denoiser.num_steps = steps
            z = denoiser(noisy, noise_level=level)
            slopes.append(float((z - noisy + weight * denoiser.gradient(z, kernels)).norm()))
        assert slopes[1] < 0.5 * slopes[0]


def test_learns():
    torch.manual_seed(0)
    denoiser = WeaklyConvexRidgeDenoiser(2, (6, 4), kernel_size=5, num_steps=5)
    clean = torch.zeros(4, 2, 24, 24)
    clean[:, :, 6:18, 4:20] = torch.rand(4, 2, 1, 1)
    noisy = clean + 0.05 * torch.randn_like(clean)
    optimizer, losses = torch.optim.Adam(denoiser.parameters(), lr=0.01), []
    for _ in range(15):
        loss = (denoiser(noisy, 0.05) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in denoiser.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_zeros_and_gradients_there_are_finite():
    denoiser = build()
    x = torch.zeros(1, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    loss = denoiser(x, 0.1).square().sum() + denoiser.energy(x).sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert bool(x.grad.isfinite().all())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in denoiser.parameters())


def test_bad_input_is_refused():
    for settings in (
        {"kernel_size": 4},
        {"features": 0},
        {"features": ()},
        {"tail": 1.0},
        {"floor": 0.6},
        {"floor": -0.1},
        {"threshold": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            WeaklyConvexRidgeDenoiser(2, **settings)
    denoiser = build()
    with pytest.raises(ValueError, match="noise_level"):
        denoiser(image(2, (8, 8)))
    with pytest.raises(ValueError, match="image"):
        denoiser(torch.zeros(1, 1, 8, 8), 0.1)
    with pytest.raises(ValueError, match="image"):
        denoiser.energy(torch.zeros(2, 8, 8))
