import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_deqkan.transforms import RandBorderShade, RandBorderShaded

FORMS = {
    "array": lambda image, **s: RandBorderShade(**s).set_random_state(3)(image),
    "dictionary": lambda image, **s: RandBorderShaded("image", **s).set_random_state(3)({"image": image})["image"],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 40, 30), (3, 20, 24, 28)])
def test_only_the_border_changes_towards_one_value(form, shape):
    changed = 0
    for value in (0.0, 1.0):
        image = torch.full(shape, 0.25)
        found = FORMS[form](image, prob=1.0, max_width=0.2, value_range=(value, value))
        inner = tuple(slice(round(0.2 * n), n - round(0.2 * n)) for n in shape[1:])
        assert torch.equal(found[(slice(None), *inner)], image[(slice(None), *inner)])
        assert torch.all((found - 0.25) * (value - 0.25) >= 0)
        assert torch.all((found >= 0) & (found <= 1))
        changed += int((found != image).sum())
        assert torch.equal(image, torch.full(shape, 0.25))
    assert changed > 0


@pytest.mark.parametrize("form", FORMS)
def test_strips_of_shade_one_hide_the_image(form):
    noise = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) / 2
    found = FORMS[form](noise, prob=1.0, max_width=0.3, hide=1.0, value_range=(0.9, 0.9))
    hidden = torch.isclose(found, torch.tensor(0.9))
    assert 0 < int(hidden.sum()) < hidden.numel()
    assert torch.equal(found[~hidden], noise[~hidden])


def test_the_same_strips_for_all_keys_and_never_with_probability_zero():
    image, other = torch.zeros(1, 32, 32), torch.full((1, 32, 32), 0.5)
    transform = RandBorderShaded(["a", "b"], prob=1.0, hide=1.0, value_range=(1.0, 1.0)).set_random_state(1)
    found = transform({"a": image, "b": other})
    assert torch.equal(found["a"] != image, found["b"] != other)
    assert RandBorderShade(prob=0.0).set_random_state(0)(image) is image


def test_each_side_and_about_half_of_the_sides_are_chosen():
    transform, sides = RandBorderShade(prob=1.0).set_random_state(0), []
    for _ in range(400):
        transform.randomize(2)
        sides += [(axis, at_end) for axis, at_end, _, _ in transform.strips]
    counts = [sides.count((axis, at_end)) for axis in (0, 1) for at_end in (False, True)]
    assert np.all(np.abs(np.array(counts) - 200) < 50)


def test_metadata_stay():
    image = MetaTensor(torch.rand(1, 16, 16), affine=torch.eye(4) * 2)
    found = RandBorderShade(prob=1.0).set_random_state(0)(image)
    assert torch.equal(found.affine, image.affine)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="max_width"):
        RandBorderShade(max_width=0.5)
    with pytest.raises(ValueError, match="lowest, highest"):
        RandBorderShade(value_range=(1.0, 0.0))
