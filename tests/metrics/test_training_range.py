import numpy as np
import pytest
import torch

from monai_deqkan.metrics import border_signal, image_statistics, kspace_statistics, outside_training, training_ranges


def test_statistics_by_hand():
    image = torch.zeros(1, 20, 20)
    image[0, 2:18, 2:18] = 1.0  # the border of two pixels stays dark
    numbers = image_statistics(image, (40, 10))
    share = 16 * 16 / 400
    assert numbers["border_brightness"] == 0
    assert numbers["dark_share"] == pytest.approx(1 - share)
    assert numbers["bright_share"] == pytest.approx(share)
    assert numbers["median"] == 1
    assert numbers["contrast"] == pytest.approx(np.std(image.numpy(), ddof=1), rel=1e-5)
    assert numbers["detail"] == pytest.approx(np.sqrt(2 * 16 / (20 * 19)), rel=1e-5)
    assert numbers["aspect_ratio"] == pytest.approx(np.log(4))
    assert numbers["resolution"] == 0.5
    assert "color" not in numbers


def test_color_and_volumes():
    generator = torch.Generator().manual_seed(0)
    grey = torch.rand(1, 8, 9, 10, generator=generator)
    assert image_statistics(grey.repeat(3, 1, 1, 1))["color"] == pytest.approx(0, abs=1e-6)
    colors = torch.rand(3, 8, 9, 10, generator=generator)
    assert image_statistics(colors)["color"] == pytest.approx(colors.numpy().std(axis=0, ddof=1).mean(), rel=1e-5)
    assert image_statistics(grey)["upper_quartile"] == pytest.approx(np.quantile(grey.numpy(), 0.75), rel=1e-5)


@pytest.mark.parametrize("count", [3, 300, 2000])
def test_at_most_one_percent_of_the_training_images_lie_outside(count):
    rows = np.random.default_rng(0).standard_t(3, (count, 8))  # heavy tails
    statistics = [dict(zip("abcdefgh", row, strict=True)) for row in rows]
    ranges = training_ranges(statistics)
    flagged = [outside_training(row, ranges) for row in statistics]
    assert sum(map(bool, flagged)) <= 0.01 * count
    assert outside_training({name: 100.0 for name in "abcdefgh"}, ranges) == list("abcdefgh")


def test_unknown_statistics_are_passed_over_and_equal_ones_have_some_slack():
    ranges = training_ranges([{"a": 0.5}] * 10)
    assert outside_training({"a": 0.51, "b": 9.0}, ranges) == []
    assert outside_training({"a": 0.6}, ranges) == ["a"]


def test_no_image():
    with pytest.raises(ValueError, match="at least one training image"):
        training_ranges([])


def test_statistics_of_kspace_are_its_sizes_and_its_noise():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 64, 60, dtype=torch.complex64, generator=generator)
    levels = torch.tensor([0.3, 0.4]).view(2, 1, 1)
    mask = (torch.arange(60) % 3 == 0).view(1, 1, 60)
    # E|n|^2 = 1: the root mean square over both coils' levels of one part.
    found = kspace_statistics(2**0.5 * levels * noise * mask, mask)
    assert {name: found[name] for name in ("coils", "rows", "columns")} == {"coils": 2, "rows": 64, "columns": 60}
    assert found["acceleration"] == pytest.approx(3)
    assert 10 ** found["log_noise_level"] == pytest.approx((0.5 * (0.09 + 0.16)) ** 0.5, rel=0.1)
    assert kspace_statistics(2**0.5 * levels * noise * mask)["acceleration"] == pytest.approx(3)  # inferred
    assert kspace_statistics(torch.ones(1, 4, 4) * (torch.arange(4) < 0) + 0j, mask[..., :4])["log_noise_level"] == -12


def test_border_signal_is_that_of_the_more_covered_side():
    image = torch.zeros(20, 80)
    image[:, 20:60] = 1.0
    assert border_signal(image) == 0
    image[:5, :2] = 0.5  # a quarter of the left end, as wide as is looked at
    image[:15, -2:] = 0.2  # too dark to count
    assert border_signal(image) == 0.25
    assert border_signal(-3 * image) == 0.25
    assert border_signal(torch.zeros(4, 5)) == 0
    assert border_signal(torch.ones(3, 4, 5)) == 1
