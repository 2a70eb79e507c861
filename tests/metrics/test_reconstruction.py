import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from monai_deqkan.metrics import (
    NMSEMetric,
    ReferencePSNRMetric,
    ReferenceSSIMMetric,
    ReferenceVIFMetric,
    head_region,
    magnitude,
    nmse,
    psnr,
    ssim,
    vif,
    volume_metrics,
)


def pair(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(*shape, generator=generator, dtype=dtype)
    reference = reference * torch.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
    return reference + 0.1 * torch.randn(*shape, generator=generator, dtype=dtype), reference


@pytest.mark.parametrize("shape", [(3, 1, 24, 19), (2, 1, 9, 10, 11)])
def test_metrics_agree_with_scikit_image(shape):
    prediction, reference = pair(*shape)
    for b in range(shape[0]):
        x, y = prediction[b, 0].numpy(), reference[b, 0].numpy()
        expected = {
            nmse: np.sum((x - y) ** 2) / np.sum(y**2),
            psnr: peak_signal_noise_ratio(y, x, data_range=y.max()),
            ssim: structural_similarity(y, x, data_range=y.max()),
        }
        for function, value in expected.items():
            assert float(function(prediction, reference)[b]) == pytest.approx(float(value), rel=1e-10)


def test_metrics_agree_with_fastmri():
    evaluate = pytest.importorskip("fastmri.evaluate")
    prediction, reference = pair(1, 1, 20, 20)
    x, y = prediction[:, 0].numpy(), reference[:, 0].numpy()
    for name, function in (("nmse", nmse), ("psnr", psnr), ("ssim", ssim)):
        expected = float(np.squeeze(getattr(evaluate, name)(y, x)))
        assert float(function(prediction, reference)) == pytest.approx(expected, rel=1e-10)


def test_volume_metrics_agree_with_fastmri_and_scikit_image():
    evaluate = pytest.importorskip("fastmri.evaluate")
    prediction, reference = pair(3, 1, 48, 44)
    x, y = prediction[:, 0].numpy(), reference[:, 0].numpy()
    found = volume_metrics(prediction, reference)
    for name in ("nmse", "psnr", "ssim"):
        assert found[name] == pytest.approx(float(np.squeeze(getattr(evaluate, name)(y, x))), rel=1e-10)
    peak = reference.max().expand(3)
    assert found["vif"] == pytest.approx(float(vif(prediction, reference, data_range=peak).mean()))
    region = torch.zeros_like(reference, dtype=torch.bool)
    region[1:, :, 4:44, 4:40] = True
    inside = volume_metrics(prediction, reference, region)
    error = ((x - y)[1:, 4:44, 4:40] ** 2).mean()
    assert inside["psnr"] == pytest.approx(10 * np.log10(y.max() ** 2 / error))


def plain_vif(x, y, noise=2.0):
    """The pixel-domain formula in SciPy, scale by scale."""
    top = bottom = 0.0
    for scale in range(1, 5):
        width = 2 ** (5 - scale) + 1
        axis = np.arange(width) - width // 2
        window = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * (width / 5) ** 2))
        window /= window.sum()

        def blur(image, window=window):
            return convolve2d(image, window, mode="valid")

        if scale > 1:
            x, y = blur(x)[::2, ::2], blur(y)[::2, ::2]
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        gain = (blur(x * y) - mean_x * mean_y) / (var_y + 1e-10)
        rest = np.where(gain < 0, var_x, var_x - gain * (blur(x * y) - mean_x * mean_y))
        gain = np.maximum(gain, 0)
        top += np.log10(1 + gain**2 * var_y / (np.maximum(rest, 1e-10) + noise)).sum()
        bottom += np.log10(1 + var_y / noise).sum()
    return top / bottom


def test_vif_is_the_published_formula_at_a_range_of_255():
    prediction, reference = pair(2, 1, 50, 45)
    found = vif(prediction, reference)
    for b in range(2):
        x, y = prediction[b, 0].numpy(), reference[b, 0].numpy()
        expected = plain_vif(255 * x / y.max(), 255 * y / y.max())
        assert float(found[b]) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(vif(1e3 * prediction, 1e3 * reference), found)
    torch.testing.assert_close(vif(reference, reference), torch.ones(2, dtype=torch.float64))
    volume = vif(prediction.reshape(1, 1, 2, 50, 45), reference.reshape(1, 1, 2, 50, 45))
    peak = reference.max().expand(2)
    torch.testing.assert_close(volume[0], vif(prediction, reference, data_range=peak).mean())
    region = torch.rand(2, 1, 50, 45, generator=torch.Generator().manual_seed(1)) > 0.3
    torch.testing.assert_close(
        vif(prediction, reference, region),
        vif(prediction * region, reference * region, data_range=reference.flatten(1).amax(1)),
    )
    metric = ReferenceVIFMetric()
    metric(prediction.float(), reference.float())
    assert float(metric.aggregate()) == pytest.approx(float(found.mean()), rel=1e-4)


def test_only_the_region_counts():
    prediction, reference = pair(2, 1, 20, 20)
    region = torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    region[..., 5:15, 4:12] = True
    inside = (prediction[..., 5:15, 4:12], reference[..., 5:15, 4:12])
    torch.testing.assert_close(nmse(prediction, reference, region), nmse(*inside))
    mean = (inside[0] - inside[1]).square().flatten(1).mean(1)
    peak = reference.flatten(1).amax(1)
    torch.testing.assert_close(psnr(prediction, reference, region), 10 * torch.log10(peak**2 / mean))
    maps = [
        structural_similarity(r, p, data_range=r.max(), full=True)[1][5:15, 4:12].mean()
        for p, r in zip(prediction[:, 0].numpy(), reference[:, 0].numpy(), strict=True)
    ]
    # scikit-image pads its map by reflection, which does not reach these pixels.
    torch.testing.assert_close(ssim(prediction, reference, region), torch.tensor(maps, dtype=torch.float64))


def test_classes_average_over_samples_and_take_magnitudes():
    prediction, reference = pair(3, 2, 16, 16, dtype=torch.float32)
    x = (prediction[:, 0] ** 2 + prediction[:, 1] ** 2).sqrt().unsqueeze(1)
    y = (reference[:, 0] ** 2 + reference[:, 1] ** 2).sqrt().unsqueeze(1)
    region = head_region(y, 0.5)
    for metric, function in (
        (NMSEMetric, nmse),
        (ReferencePSNRMetric, psnr),
        (ReferenceSSIMMetric, ssim),
    ):
        whole, inside = metric(), metric(region=lambda image: head_region(image, 0.5))
        whole(prediction[:2], reference[:2])
        whole(prediction[2:], y[2:])  # two channels against a magnitude
        torch.testing.assert_close(whole.aggregate(), function(x, y).mean().reshape(1))
        # As MONAI's evaluators call it: lists of samples without batch axis.
        inside(list(torch.complex(prediction[:, 0], prediction[:, 1])), list(y[:, 0] + 0j))
        torch.testing.assert_close(inside.aggregate(), function(x, y, region).mean().reshape(1))


def test_an_empty_reference_does_not_spoil_the_mean():
    metric = NMSEMetric()
    metric(torch.ones(2, 1, 8, 8), torch.stack([torch.zeros(1, 8, 8), 2 * torch.ones(1, 8, 8)]))
    # 0.25 for the second sample; the first, an error without a reference, is infinite and must show.
    assert torch.isinf(metric.aggregate())
    metric.reset()
    metric(
        torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]),
        torch.stack([torch.zeros(1, 8, 8), 2 * torch.ones(1, 8, 8)]),
    )
    assert float(metric.aggregate()) == pytest.approx(0.25)


def test_head_region_fills_holes_per_sample():
    image = torch.full((2, 1, 12, 12), 0.05)
    image[0, 0, 2:9, 3:10] = 1
    image[0, 0, 4:6, 5:7] = 0
    image[1] = 10 * image[0].flip(-1)
    expected = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    expected[0, 0, 2:9, 3:10] = True
    expected[1] = expected[0].flip(-1)
    assert torch.equal(head_region(image), expected)
    assert bool(head_region(image, 0.0).all())


def test_magnitude_of_each_layout():
    x = torch.tensor([3 + 4j, 0j]).reshape(1, 1, 2)
    expected = torch.tensor([5.0, 0.0]).reshape(1, 1, 1, 2)
    channels = torch.stack((x.real, x.imag), 1).requires_grad_()
    torch.testing.assert_close(magnitude(x), expected)
    torch.testing.assert_close(magnitude(channels), expected)
    torch.testing.assert_close(magnitude(expected), expected)
    magnitude(channels).sum().backward()
    torch.testing.assert_close(channels.grad[0, :, 0], torch.tensor([[0.6, 0.0], [0.8, 0.0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nmse(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 5)), "shape of the reference"),
        (lambda: psnr(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), torch.ones(4, 4)), "`region`"),
        (lambda: ssim(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)), "win_size"),
        (lambda: vif(torch.ones(1, 1, 40, 50), torch.ones(1, 1, 40, 50)), "41"),
        (lambda: psnr(torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4), data_range=torch.ones(1)), "data_range"),
        (lambda: volume_metrics(torch.ones(1, 1, 1, 4, 4), torch.ones(1, 1, 1, 4, 4)), "slices"),
        (lambda: magnitude(torch.ones(1, 3, 4, 4)), "channels"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
