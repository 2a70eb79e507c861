import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from monai_deqkan.losses import PerpendicularLoss, ReconstructionLoss


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def test_without_weights_it_is_the_perpendicular_loss():
    prediction, target = randn(2, 9, 8), randn(2, 9, 8, seed=1)
    torch.testing.assert_close(ReconstructionLoss()(prediction, target), PerpendicularLoss()(prediction, target))


def test_terms_add_up_by_their_weights():
    a, b = (randn(2, 9, 8, seed=seed).numpy() for seed in (0, 1))
    expected = 0.5 * np.abs(a - b).mean() + 3 * (np.abs(a - b) ** 2).mean() + 2 * np.abs(np.abs(a) - np.abs(b)).mean()
    loss = ReconstructionLoss({"l1": 0.5, "mse": 3, "magnitude": 2, "perpendicular": 0})
    assert float(loss(torch.tensor(a), torch.tensor(b))) == pytest.approx(expected)
    channels = [torch.stack((torch.tensor(x.real), torch.tensor(x.imag)), dim=1) for x in (a, b)]
    assert float(loss(*channels)) == pytest.approx(expected)


@pytest.mark.parametrize("space", [(9, 8), (4, 6, 5)])
def test_kspace_terms_are_those_of_the_centred_orthonormal_transform(space):
    images = [randn(2, *space, seed=seed) for seed in (0, 1)]
    axes = tuple(range(1, 1 + len(space)))
    spectra = [
        np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(x.numpy(), axes), axes=axes, norm="ortho"), axes) for x in images
    ]
    found = float(ReconstructionLoss({"l1": 1}, domain="kspace")(*images))
    assert found == pytest.approx(np.abs(spectra[0] - spectra[1]).mean())
    mse = [float(ReconstructionLoss({"mse": 1}, domain=domain)(*images)) for domain in ("image", "kspace")]
    assert mse[0] == pytest.approx(mse[1])


def test_ssim_of_an_empty_target_is_finite():
    prediction = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = ReconstructionLoss({"ssim": 1.0})(prediction, torch.zeros(1, 2, 16, 16))
    loss.backward()
    assert 0 < float(loss.detach()) <= 1
    assert bool(prediction.grad.isfinite().all())
    assert float(prediction.grad.abs().max()) > 0


def test_ssim_is_of_magnitudes_scaled_by_the_maximum():
    prediction, target = randn(1, 24, 20).to(torch.complex64), 7 * randn(1, 24, 20, seed=1).to(torch.complex64)
    first, second = (x[0].abs().double().numpy() for x in (prediction, target))
    expected = structural_similarity(
        first, second, data_range=second.max(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    for domain in ("image", "kspace"):
        loss = ReconstructionLoss({"ssim": 2.0}, domain=domain)
        assert float(loss(prediction, target)) == pytest.approx(2 * (1 - expected), abs=2e-3)
    turned = prediction * complex(0.6, 0.8)
    torch.testing.assert_close(loss(turned, target), loss(prediction, target))


def test_gradient_is_finite_at_zero_and_right():
    loss = ReconstructionLoss(dict.fromkeys(ReconstructionLoss.terms, 1.0))
    zero = torch.zeros(1, 2, 12, 12, requires_grad=True)
    loss(zero, torch.ones(1, 2, 12, 12)).backward()
    assert bool(zero.grad.isfinite().all())
    smooth = ReconstructionLoss({"perpendicular": 1, "mse": 0.5, "l1": 0.3}, domain="kspace")
    target = randn(1, 3, 4, seed=2)
    assert torch.autograd.gradcheck(lambda x: smooth(x, target), randn(1, 3, 4).requires_grad_())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"weights": {"sssim": 1}}, ValueError, "got 'sssim'.*'ssim'"),
        ({"weights": {"l1": -1}}, ValueError, "l1"),
        ({"weights": {"l1": 0}}, ValueError, "one of them positive"),
        ({"weights": {"l1": float("inf")}}, ValueError, "finite"),
        ({"weights": ["l1"]}, TypeError, "got list"),
        ({"domain": "wavelet"}, ValueError, "domain"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        ReconstructionLoss(**settings)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        ReconstructionLoss()(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 7))


def test_half_precision_of_a_trainer_does_not_reach_the_loss():
    images = [torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    loss = ReconstructionLoss(dict.fromkeys(ReconstructionLoss.terms, 1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*images)
    assert torch.equal(found, loss(*images))
    half = loss(images[0].half(), images[1])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, found, rtol=1e-2, atol=0)
