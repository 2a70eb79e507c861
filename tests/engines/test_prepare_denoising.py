import math

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from scipy.stats import kstest

from monai_deqkan.engines import PrepareBatchDenoising, denoising_metrics, unit_image


def batch(count=2, size=8, channels=1, seed=0):
    return {"image": torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))}


def test_noise_is_gaussian_of_the_level_told_and_the_level_log_uniform():
    torch.manual_seed(0)
    noisy, (clean, level), args, settings = PrepareBatchDenoising(noise_range=(0.01, 0.1))(batch(400, 16))
    assert args == ()
    assert torch.equal(settings["noise_level"], level)
    noise = ((noisy - clean) / level.view(-1, 1, 1, 1)).double().numpy()
    assert kstest(noise[:20].ravel(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]) < 0.01
    shares = (level.double().log() - math.log(0.01)) / math.log(10)
    assert kstest(shares.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("channels", [1, 2])
def test_phase_leaves_the_magnitude_and_is_smooth(channels):
    torch.manual_seed(0)
    data = batch(60, 16, channels)
    _, (clean, _), _, _ = PrepareBatchDenoising(phase_prob=0.5)(data)
    magnitude = data["image"].square().sum(dim=1).sqrt()
    torch.testing.assert_close(clean.square().sum(dim=1).sqrt(), magnitude, rtol=1e-4, atol=1e-6)
    first = torch.complex(clean[:, 0], clean[:, 1])
    image = data["image"]
    second = torch.complex(image[:, 0], image[:, 1] if channels == 2 else torch.zeros_like(image[:, 0]))
    phase = (first * second.conj()).angle().numpy()
    flat = np.abs(phase).max(axis=(1, 2)) < 1e-4
    assert 15 < flat.sum() < 45
    # A polynomial of second degree: its third differences vanish, where the phase does not wrap.
    mild = ~flat & (np.abs(phase).max(axis=(1, 2)) < 3)
    assert np.abs(np.diff(phase[mild], 3, axis=1)).max() < 1e-4


def test_inversion():
    prepare = PrepareBatchDenoising(phase_prob=0.0, inversion_prob=1.0)
    _, (clean, _), _, _ = prepare(batch())
    torch.testing.assert_close(clean[:, :1], 1 - batch()["image"], rtol=0, atol=1e-6)
    assert float(clean[:, 1].abs().max()) < 1e-6


def test_fixed_levels_and_seed_repeat_themselves_and_let_chance_elsewhere_alone():
    prepare = PrepareBatchDenoising(False, noise_levels=[0.02, 0.1], seed=3)
    state = torch.get_rng_state()
    first, again = prepare(batch(3)), prepare(batch(3))
    assert torch.equal(first[0], again[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert first[3] == {}
    clean, level = first[1]
    torch.testing.assert_close(level, torch.tensor([0.02, 0.1] * 3))
    assert torch.equal(clean[::2], clean[1::2])
    spread = (first[0] - clean).flatten(1).std(dim=1)
    torch.testing.assert_close(spread, level, rtol=0.3, atol=0)


def test_metrics_are_told_apart_by_level():
    levels = [0.02, 0.1]
    prepare = PrepareBatchDenoising(noise_levels=levels, phase_prob=0.0, seed=0)
    noisy, target, _, _ = prepare(batch(3, 32))
    engine = Engine(lambda engine, data: {"pred": noisy, "label": target})
    for name, metric in denoising_metrics(levels).items():
        metric.attach(engine, name)
    engine.run([0])
    magnitudes = [x.double().square().sum(dim=1).sqrt().numpy() for x in (noisy, target[0])]
    for index, level in enumerate(levels):
        expected = [
            10 * np.log10(b.max() ** 2 / np.mean((a - b) ** 2))
            for a, b in zip(magnitudes[0][index::2], magnitudes[1][index::2], strict=True)
        ]
        assert engine.state.metrics[f"val_psnr_{level:g}"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_unit_image():
    real = unit_image(torch.tensor([[[2.0, 4.0]]], dtype=torch.float64))
    assert real.tolist() == [[[0.5, 1.0]], [[0.0, 0.0]]]
    assert real.dtype == torch.float32
    assert unit_image(torch.tensor([[[3.0]], [[4.0]]])).flatten().tolist() == pytest.approx([0.6, 0.8])
    assert unit_image(torch.zeros(1, 2, 2)).abs().max() == 0
    for unit in (1e-30, 1e30):
        scaled = unit_image(unit * torch.tensor([[[3.0, 0.0]], [[4.0, 1.0]]]))
        torch.testing.assert_close(scaled, torch.tensor([[[0.6, 0.0]], [[0.8, 0.2]]]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PrepareBatchDenoising()({"kspace": 1}), KeyError, "'image'"),
        (lambda: PrepareBatchDenoising()({"image": torch.zeros(1, 3, 4, 4)}), ValueError, "shape"),
        (lambda: PrepareBatchDenoising(noise_range=(0.2, 0.1)), ValueError, "lowest"),
        (lambda: PrepareBatchDenoising(noise_range=(0.2,)), ValueError, "lowest"),
        (lambda: PrepareBatchDenoising(noise_range=(0.2, math.inf)), ValueError, "noise_range"),
        (lambda: PrepareBatchDenoising(max_phase=math.inf), ValueError, "max_phase"),
        (lambda: PrepareBatchDenoising(noise_levels=[]), ValueError, "one at least"),
        (lambda: PrepareBatchDenoising(noise_levels=[0.1, math.inf]), ValueError, "finite"),
        (lambda: PrepareBatchDenoising(phase_prob=2.0), ValueError, "phase_prob"),
        (lambda: unit_image(torch.zeros(3, 2, 2)), ValueError, "shape"),
        (lambda: unit_image(torch.tensor(1.0)), ValueError, "shape"),
        (lambda: unit_image(torch.tensor([[1.0, math.nan]])), ValueError, "finite"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
