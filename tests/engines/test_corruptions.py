import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_deqkan.engines import CORRUPTIONS, corrupt
from monai_deqkan.engines.corruptions import image_generators

SHAPES = [(3, 1, 20, 24), (2, 2, 10, 12, 14)]


def images(shape, seed=0):
    return 0.2 + 0.6 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def coin(name, seed, index):
    return bool(torch.rand((), generator=image_generators(name, seed, index, 1)[0]) < 0.5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_seeded_by_image_and_graded_by_severity(name, shape):
    given = images(shape)
    kept = given.clone()
    results = [corrupt(given, name, severity, seed=3) for severity in range(1, 6)]
    assert torch.equal(given, kept)
    assert all(result.min() >= 0 and result.max() <= 1 and result.shape == given.shape for result in results)
    distances = [float((result - given).norm()) for result in results]
    assert distances == sorted(distances)
    assert distances[0] > 0 or name == "blur"  # its mildest sigma is less than a tenth of these pixels
    assert distances[4] > 0
    alone = corrupt(given[1:], name, 4, seed=3, first_index=1)
    torch.testing.assert_close(alone, results[3][1:], rtol=0, atol=1e-6)
    assert torch.equal(corrupt(given, name, 4, seed=3), results[3])
    double = corrupt(given.double(), name, 4, seed=3)
    torch.testing.assert_close(double.float(), results[3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian_noise", "gamma", "rotation", "occlusion"])
def test_seeds_and_images_differ(name):
    same = images((1, 1, 20, 24)).expand(12, 1, 20, 24)
    first, second = corrupt(same, name, 3, seed=0), corrupt(same, name, 3, seed=1)
    assert not torch.equal(first, second)
    assert not all(torch.equal(first[0], other) for other in first[1:])


def test_noise_has_its_standard_deviation():
    flat = torch.full((2, 1, 200, 200), 0.5)
    for severity, sigma in enumerate(CORRUPTIONS["gaussian_noise"].settings[:3], start=1):
        noise = corrupt(flat, "gaussian_noise", severity) - flat
        assert float(noise.std()) == pytest.approx(sigma, rel=0.02)
        assert float(noise.mean()) == pytest.approx(0, abs=0.02 * sigma)


def test_contrast_and_gamma_by_their_formulas():
    given = images(SHAPES[0])
    for severity in range(1, 6):
        factor, exponent = (CORRUPTIONS[name].settings[severity - 1] for name in ("contrast", "gamma"))
        lower, bent = corrupt(given, "contrast", severity), corrupt(given, "gamma", severity)
        for index, image in enumerate(given.numpy()):
            np.testing.assert_allclose(lower[index], image.mean() + factor * (image - image.mean()), atol=1e-6)
            power = exponent if coin("gamma", 0, index) else 1 / exponent
            np.testing.assert_allclose(bent[index], image**power, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 50, 60), (1, 1, 24, 26, 30)])
def test_blur_as_scipy_does_it(shape):
    given = images(shape).double()
    for severity in (2, 5):
        sigma = CORRUPTIONS["blur"].settings[severity - 1] * min(shape[2:])
        expected = ndimage.gaussian_filter(given[0, 0].numpy(), sigma, mode="nearest", truncate=4.0)
        np.testing.assert_allclose(corrupt(given, "blur", severity)[0, 0], expected, atol=1e-6)


def test_rotation_as_scipy_does_it_on_an_oblong_image():
    given = images((8, 1, 30, 40)).double()
    result = corrupt(given, "rotation", 5)
    signs = set()
    for index in range(8):
        sign = 1 if coin("rotation", 0, index) else -1
        signs.add(sign)
        expected = ndimage.rotate(
            given[index, 0].numpy(), sign * CORRUPTIONS["rotation"].settings[4], reshape=False, order=1
        )
        # SciPy takes pixels just outside as zero at once, grid_sample fades them out: compare away from the border.
        np.testing.assert_allclose(result[index, 0, 10:20, 12:28], expected[10:20, 12:28], atol=1e-6)
    assert signs == {1, -1}


def test_rotation_in_a_volume_keeps_one_axis():
    flat = images((6, 1, 20, 20, 20)).double()
    turned = corrupt(flat, "rotation", 3)
    center = slice(6, 14)
    # A volume that changes along one axis only is left alone by a turn about that axis.
    for axis in range(3):
        ramp = torch.linspace(0.1, 0.9, 20, dtype=torch.float64).view([20 if d == axis else 1 for d in range(3)])
        volumes = ramp.expand(6, 1, 20, 20, 20)
        result = corrupt(volumes, "rotation", 3)[..., center, center, center]
        expected = volumes[..., center, center, center]
        kept = [torch.allclose(a, b, atol=1e-9) for a, b in zip(result, expected, strict=True)]
        assert 0 < sum(kept) < 6
    assert not torch.equal(turned, flat)


def test_occlusion_blackens_one_box():
    given = images((8, 2, 20, 30))
    black = corrupt(given, "occlusion", 3) == 0
    for mask in black:
        assert torch.equal(mask[0], mask[1])
        rows, columns = mask[0].any(1).nonzero().flatten(), mask[0].any(0).nonzero().flatten()
        assert (len(rows), len(columns), int(mask[0].sum())) == (6, 9, 54)
        assert rows[-1] - rows[0] == 5


def test_errors_say_what_to_do():
    good = images(SHAPES[0])
    with pytest.raises(ValueError, match=r"one of gaussian_noise.*Did you mean 'gamma'"):
        corrupt(good, "gama", 1)
    with pytest.raises(ValueError, match="severity"):
        corrupt(good, "gamma", 6)
    with pytest.raises(ValueError, match=r"\[0, 1\]; got values from .* Scale"):
        corrupt(255 * good, "gamma", 1)
    with pytest.raises(TypeError, match="floating-point"):
        corrupt(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "gamma", 1)
    with pytest.raises(ValueError, match="shape"):
        corrupt(good[0, 0], "gamma", 1)
    with pytest.raises(ValueError, match="NaN"):
        corrupt(good * torch.nan, "gamma", 1)


def test_the_table_in_the_documentation_is_this_one():
    page = (Path(__file__).parents[2] / "docs/how-to/robustness.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ([\d., ]+) \|$", page, flags=re.MULTILINE))
    assert {name: tuple(map(float, row.split(", "))) for name, row in rows.items()} == {
        name: corruption.settings for name, corruption in CORRUPTIONS.items()
    }
