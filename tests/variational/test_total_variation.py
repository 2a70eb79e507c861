import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from skimage.restoration import denoise_tv_chambolle

from monai_deqkan.operators import LinearOperator, MRIOperator, random_mask, simulate_kspace, smooth_coil_maps
from monai_deqkan.solvers import ConvergenceError, ConvergenceWarning
from monai_deqkan.variational import tv_sense


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Identity(LinearOperator):
    """Denoising: no physics at all."""

    def forward(self, x):
        return x

    def adjoint(self, y):
        return y

    def take(self, rows):
        return self


def problem(space=(12, 10), num_coils=3, batch=2):
    maps = smooth_coil_maps(space, num_coils, generator=seeded()).to(torch.complex128)
    image = torch.zeros(batch, *space, dtype=torch.float64)
    image[:, 3:9, 2:7] = 1.0
    image = image + torch.arange(batch).reshape(-1, *[1] * len(space)) * 0.5
    mask = torch.stack([random_mask(space[-1], 2.0, 0.2, generator=seeded(i)) for i in range(batch)])
    mask = mask.reshape(batch, 1, *[1] * (len(space) - 1), -1)
    return simulate_kspace(image, maps, snr_db=25, generator=seeded()) * mask, MRIOperator(
        mask, maps[None], spatial_dims=len(space)
    )


def value(x, kspace, operator, weight):
    """The function that is minimized, in plain terms."""
    scale = operator.adjoint(kspace).abs().max()
    parts = []
    for axis in range(1, x.ndim):
        difference = torch.diff(x, dim=axis, append=x.narrow(axis, x.shape[axis] - 1, 1))
        parts.append(difference.abs().square())
    return 0.5 * (operator(x) - kspace).abs().square().sum() + weight * scale * (sum(parts)).clamp_min(0).sqrt().sum()


def test_denoising_agrees_with_scikit_image():
    image = torch.zeros(24, 20, dtype=torch.float64)
    image[6:16, 5:14] = 1.0
    image += 0.1 * torch.randn(image.shape, generator=seeded(), dtype=torch.float64)
    weight = 0.08
    y = image[None].to(torch.complex128)
    solution = tv_sense(y, operator=Identity(), weight=weight, rtol=1e-5, max_iter=1000)
    # scikit-image's weight is ours times the scale, the largest absolute value.
    expected = denoise_tv_chambolle(
        image.numpy(), weight=weight * float(image.abs().max()), eps=1e-10, max_num_iter=5000
    )
    assert bool(solution.converged.all())
    np.testing.assert_allclose(solution.image[0].real.numpy(), expected, atol=1e-3)
    assert float(solution.image.imag.abs().max()) < 1e-12


@pytest.mark.parametrize("space", [(12, 10), (5, 9, 10)])
def test_objective_is_that_of_a_long_solve_and_of_the_plain_formula(space):
    kspace, operator = problem(space)
    solution = tv_sense(kspace, operator=operator, weight=5e-3)
    long = tv_sense(kspace, operator=operator, weight=5e-3, rtol=1e-5, max_iter=1000)
    assert bool(solution.converged.all())
    assert bool(long.converged.all())
    for b in range(2):
        single = operator.take(torch.tensor([b]))
        plain = value(long.image[b : b + 1], kspace[b : b + 1], single, 5e-3)
        torch.testing.assert_close(long.objective[b], plain, rtol=1e-9, atol=0)
    assert float((solution.objective / long.objective - 1).abs().max()) < 2e-3
    torch.testing.assert_close(solution.image, long.image, rtol=0, atol=2e-2)


def test_no_other_minimizer_finds_less():
    kspace, operator = problem((8, 8), batch=1)
    found = tv_sense(kspace, operator=operator, weight=0.02, rtol=1e-5, max_iter=1000)

    def smooth(vector):
        x = torch.view_as_complex(torch.from_numpy(vector).reshape(1, 8, 8, 2)).requires_grad_()
        parts = sum(torch.diff(x, dim=axis, append=x.narrow(axis, 7, 1)).abs().square() for axis in (1, 2))
        scale = operator.adjoint(kspace).abs().max()
        loss = 0.5 * (operator(x) - kspace).abs().square().sum() + 0.02 * scale * (parts + 1e-10).sqrt().sum()
        (gradient,) = torch.autograd.grad(loss, x)
        return float(loss.detach()), torch.view_as_real(gradient).flatten().numpy()

    start = torch.view_as_real(operator.adjoint(kspace)).flatten().numpy().copy()
    best = minimize(smooth, start, jac=True, method="L-BFGS-B", options={"maxiter": 3000, "maxfun": 6000})
    # The smoothing adds at most 64 pixels' worth of 1e-5.
    assert float(found.objective) <= best.fun + 1e-5
    assert float(found.objective) == pytest.approx(best.fun, rel=3e-3)


def test_unit_of_kspace_does_not_matter_and_samples_are_independent():
    kspace, operator = problem()
    weight = torch.tensor([2e-3, 2e-2], dtype=torch.float64)
    together = tv_sense(kspace, operator=operator, weight=weight, rtol=1e-4, max_iter=1000)
    scaled = tv_sense(1e4 * kspace, operator=operator, weight=weight, rtol=1e-4, max_iter=1000)
    torch.testing.assert_close(scaled.image, 1e4 * together.image)
    for b in range(2):
        rows = torch.tensor([b])
        alone = tv_sense(kspace[rows], operator=operator.take(rows), weight=float(weight[b]), rtol=1e-4, max_iter=1000)
        torch.testing.assert_close(alone.image[0], together.image[b])
        assert int(alone.stats.evaluations) == int(together.stats.evaluations[b])


def test_edges_of_use():
    kspace, operator = problem()
    with pytest.warns(ConvergenceWarning, match="TV by ADMM"):
        stopped = tv_sense(kspace, operator=operator, max_iter=1)
    assert stopped.stats.evaluations.tolist() == [1, 1]
    with pytest.raises(ConvergenceError):
        tv_sense(kspace, operator=operator, max_iter=1, on_failure="raise")
    silent = tv_sense(0 * kspace, operator=operator)
    assert bool(silent.converged.all())
    assert not silent.image.any()
    broken = kspace.clone()
    broken[0, 0, 0, 0] = float("nan")
    for call, message in (
        (lambda: tv_sense(broken, operator=operator), "finite"),
        (lambda: tv_sense(kspace, operator.mask, operator=operator), "either"),
        (lambda: tv_sense(kspace, operator=operator, weight=-1.0), "weight"),
        (lambda: tv_sense(kspace, operator=operator, weight=torch.ones(3)), "one per sample"),
        (lambda: tv_sense(kspace, operator=operator, relaxation=2.0), "relaxation"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
