import json

import pytest
import torch

from monai_deqkan.engines import (
    SpreadInferer,
    calibrate_spread,
    ensemble_spread,
    load_ensemble,
    load_spread_factor,
    resampled_spread,
)
from monai_deqkan.operators import FourierOperator, MRIOperator, drop_lines, random_mask

SIGMA = 0.05


class ZeroFilled(torch.nn.Module):
    """A linear reconstruction with one weight."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, kspace, mask=None, sensitivity_maps=None):
        image = self.weight * MRIOperator(mask, sensitivity_maps).adjoint(kspace)
        return torch.stack([image.real, image.imag], dim=1)


def bright(batch=2, height=24, width=20, seed=0):
    """Single-coil k-space of an image far above the noise, with noise of standard deviation SIGMA in each part."""
    generator = torch.Generator().manual_seed(seed)
    image = 5 + torch.rand(batch, height, width, generator=generator)
    clean = FourierOperator(2)(image.to(torch.complex64))[:, None]
    noise = 2**0.5 * SIGMA * torch.randn(clean.shape, dtype=torch.complex64, generator=generator)
    return clean + noise, image, torch.ones_like(clean)


def test_noise_spread_of_a_linear_reconstruction_is_the_noise():
    kspace, _, maps = bright()
    mask = torch.ones(1, 1, 1, kspace.shape[-1])
    result = resampled_spread(ZeroFilled(2.0), kspace, mask, maps, num_samples=200, noise_level=SIGMA)
    # The transform is orthonormal and the image bright: the magnitude's deviation is that of one part, times two.
    assert float(result.spread.mean()) == pytest.approx(2 * SIGMA, rel=0.02)
    assert result.spread.shape == (2, 1, 24, 20)
    torch.testing.assert_close(result.image, ZeroFilled(2.0)(kspace, mask, maps))
    per_coil = torch.tensor([[SIGMA], [3 * SIGMA]])
    result = resampled_spread(ZeroFilled(), kspace, mask, maps, num_samples=200, noise_level=per_coil)
    assert (result.spread[1].mean() / result.spread[0].mean()).item() == pytest.approx(3, rel=0.03)


def test_noise_goes_to_measured_samples_only():
    seen = []

    class Watching(ZeroFilled):
        def forward(self, kspace, mask=None, sensitivity_maps=None):
            seen.append(kspace)
            return super().forward(kspace, mask, sensitivity_maps)

    kspace, _, maps = bright(1)
    mask = random_mask(20, 2, 0.2, generator=torch.Generator().manual_seed(0)).view(1, 1, 1, -1)
    resampled_spread(Watching(), kspace * mask, mask, maps, num_samples=2)
    assert not torch.equal(seen[1], seen[2])
    for sample in seen:
        torch.testing.assert_close(sample * ~mask, torch.zeros_like(sample))


def test_line_spread_is_the_deviation_over_the_drawn_masks():
    kspace, _, maps = bright()
    mask = random_mask(20, 1.5, 0.2, generator=torch.Generator().manual_seed(0)).view(1, 1, 1, -1)
    found = resampled_spread(ZeroFilled(), kspace * mask, mask, maps, method="mask", num_samples=5, drop_share=0.4)
    generator = torch.Generator().manual_seed(0)
    images = []
    for _ in range(5):  # the same lines for both samples, as each draws as if it were alone
        kept = drop_lines(kspace[:1] * mask, mask, 0.4, generator=generator)
        images.append(FourierOperator(2).adjoint(kspace * kept)[:, 0].abs())
    torch.testing.assert_close(found.spread[:, 0], torch.stack(images).std(dim=0), atol=1e-5, rtol=1e-4)


def test_ensemble_spread():
    kspace, _, maps = bright()
    networks = [ZeroFilled(weight) for weight in (1.0, 1.2, 1.4)]
    result = ensemble_spread(networks, kspace, torch.ones(1, 1, 1, 20), maps)
    # The deviation of 1, 1.2 and 1.4 is 0.2.
    torch.testing.assert_close(result.spread[:, 0], 0.2 * FourierOperator(2).adjoint(kspace)[:, 0].abs())
    with pytest.raises(ValueError, match="at least two networks"):
        ensemble_spread(networks[:1], kspace)


def test_loaded_ensemble(tmp_path):
    torch.save(ZeroFilled(3.0).state_dict(), tmp_path / "a.pt")
    network = ZeroFilled()
    (copied,) = load_ensemble(network, [tmp_path / "a.pt"])
    assert (copied.weight.item(), network.weight.item()) == (3.0, 1.0)
    assert not copied.training


def loader(seed, count=3, names="abc"):
    for index, name in zip(range(count), names, strict=False):
        kspace, image, maps = bright(1, 48, 40, seed=seed + index)
        yield {
            "kspace": kspace,
            "mask": torch.ones(1, 1, 1, 40),
            "sensitivity_maps": maps,
            "reference_rss": image[:, None],
            "source": [f"{name}.h5"],
            "slice": torch.tensor([0]),
        }


def test_calibration_of_noise_alone_needs_no_factor(tmp_path):
    inferer = SpreadInferer(num_samples=60)
    record = calibrate_spread(ZeroFilled(), inferer, loader(0), loader(100, names="xyz"), tmp_path / "out")
    # The image is white noise too, so its level is seen too large by the standard deviation of the image over its own.
    level = ((1 / 12) / 2 + SIGMA**2) ** 0.5
    assert record["factor"] == pytest.approx(SIGMA / level, rel=0.15)
    curve = record["curves"]["test, times the factor"]
    assert max(abs(a - b) for a, b in zip(curve["shares"], curve["normal_shares"], strict=True)) < 0.06
    assert record["num_slices"] == {"validation": 3, "test": 3, "in_both": 0}
    stored = json.loads((tmp_path / "out" / "spread_calibration.json").read_text())
    assert stored["note"] == "Research only; not for clinical use."
    assert load_spread_factor(tmp_path / "out" / "spread_calibration.json", "noise") == record["factor"]
    assert load_spread_factor(tmp_path / "out" / "spread_calibration.json", "mask") == 1.0  # it says nothing of those
    with pytest.raises(FileExistsError, match="was not touched"):
        calibrate_spread(ZeroFilled(), inferer, loader(0), loader(9), tmp_path / "out")


def test_a_spread_that_tells_little_is_said_to(tmp_path, caplog):
    class Brighter(ZeroFilled):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) + 10

    record = calibrate_spread(Brighter(), SpreadInferer(num_samples=10), loader(0), loader(100, names="xyz"), tmp_path)
    assert record["factor"] > 5
    assert "the spread says little" in caplog.text


def test_slices_in_both_parts_are_told(tmp_path, caplog):
    record = calibrate_spread(ZeroFilled(), SpreadInferer(num_samples=2), loader(0), loader(0), tmp_path)
    assert record["num_slices"]["in_both"] == 3
    assert "3 slices are in both parts" in caplog.text
    with pytest.raises(ValueError, match="`test_loader` holds no batch"):
        calibrate_spread(ZeroFilled(), SpreadInferer(num_samples=2), loader(0), [], tmp_path / "b")


def test_a_missing_calibration_is_one(tmp_path, caplog):
    assert load_spread_factor(tmp_path / "none.json", "noise") == 1.0
    assert "no calibration of the spread" in caplog.text
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no calibration"):
        load_spread_factor(tmp_path / "bad.json", "noise")


def test_inferer_gives_image_and_spread_times_factor():
    kspace, _, maps = bright()
    given = {"mask": torch.ones(1, 1, 1, 20), "sensitivity_maps": maps}
    plain = resampled_spread(ZeroFilled(), kspace, **given, num_samples=3)
    found = SpreadInferer(num_samples=3, factor=2.0)(kspace, ZeroFilled(), **given)
    torch.testing.assert_close(found, torch.cat([plain.image, 2 * plain.spread], dim=1))
    both = SpreadInferer("ensemble", others=[ZeroFilled(2.0)])(kspace, ZeroFilled(), **given)
    torch.testing.assert_close(both[:, 2], FourierOperator(2).adjoint(kspace)[:, 0].abs() / 2**0.5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "dropout"}, "method"),
        ({"num_samples": 1}, "num_samples"),
        ({"drop_share": 1.0}, "drop_share"),
        ({"method": "ensemble"}, "`others` belong to the method 'ensemble'"),
        ({"others": [ZeroFilled()]}, "`others` belong to the method 'ensemble'"),
        ({"factor": float("inf")}, "factor"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        SpreadInferer(**settings)


@pytest.mark.parametrize("method", ["noise", "mask"])
def test_spread_of_a_sample_does_not_depend_on_its_batch(method):
    kspace, _, maps = bright(3)
    masks = torch.stack(
        [random_mask(20, 1.5, 0.2, generator=torch.Generator().manual_seed(seed)).view(1, 1, -1) for seed in range(3)]
    )
    settings = {"method": method, "num_samples": 3, "drop_share": 0.5}
    together = resampled_spread(ZeroFilled(), kspace * masks, masks, maps, **settings)
    for row in range(3):
        own = slice(row, row + 1)
        alone = resampled_spread(ZeroFilled(), (kspace * masks)[own], masks[own], maps[own], **settings)
        torch.testing.assert_close(together.spread[own], alone.spread, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [float("nan"), -1.0, float("inf")])
def test_noise_levels_out_of_range_are_refused(level):
    kspace, _, maps = bright(1)
    for given in (level, torch.full((1, 1), level)):
        with pytest.raises(ValueError, match="`noise_level` must"):
            resampled_spread(ZeroFilled(), kspace, torch.ones(1, 1, 1, 20), maps, noise_level=given)
