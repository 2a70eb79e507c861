import numpy as np
import pytest
import torch

from monai_deqkan.transforms import (
    ChannelsToComplex,
    ChannelsToComplexd,
    ComplexToChannels,
    ComplexToChannelsd,
    StandardizeImage,
    StandardizeImaged,
    UnstandardizeImage,
    UnstandardizeImaged,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_channels_hold_real_and_imaginary_part_in_both_forms():
    image = torch.complex(random(1, 5, 4), random(1, 5, 4, seed=1))
    channels = ComplexToChannels()(image)
    assert torch.equal(channels, torch.cat([image.real, image.imag]))
    assert torch.equal(ChannelsToComplex()(channels), image)
    assert torch.equal(ComplexToChannelsd("a")({"a": image})["a"], channels)
    assert torch.equal(ChannelsToComplexd("a")({"a": channels})["a"], image)


@pytest.mark.parametrize("shape", [(1, 9, 8), (1, 4, 5, 6)])
def test_one_channel_is_fastmri_s_instance_normalization(shape):
    transforms = pytest.importorskip("fastmri.data.transforms")
    image = 1e-5 * random(*shape).abs()
    image.view(-1)[0] = 1e-3  # far out, so that the clamp acts
    theirs, mean, std = transforms.normalize_instance(image)
    got, our_mean, our_std = StandardizeImage()(image)
    torch.testing.assert_close(got, theirs.clamp(-6, 6), rtol=1e-4, atol=1e-5)
    assert float(got.max()) == 6
    assert (our_mean.item(), our_std.item()) == pytest.approx((mean.item(), std.item()))


def test_two_channels_are_shifted_and_scaled_as_one_complex_number():
    image = random(2, 7, 6) * 3 + torch.tensor([10.0, -4.0])[:, None, None]
    got, mean, std = StandardizeImage(clamp=None)(image)
    values = (image[0] + 1j * image[1]).numpy().astype(complex)
    # One standard deviation: the root mean square of both parts' distances from their means, Bessel-corrected.
    expected_std = np.sqrt((np.abs(values - values.mean()) ** 2).sum() / (2 * values.size - 1))
    np.testing.assert_allclose(got[0] + 1j * got[1], (values - values.mean()) / expected_std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(UnstandardizeImage()(got, mean, std), image)


def test_dictionary_form_treats_the_others_alike_and_is_undone():
    image, target = random(2, 6, 6) + 5, 2 * random(2, 6, 6, seed=1)
    item = StandardizeImaged("image", also=["target", "absent"], clamp=None)({"image": image, "target": target})
    expected, mean, std = StandardizeImage(None)(image)
    torch.testing.assert_close(item["image"], expected)
    torch.testing.assert_close(item["target"], (target - mean) / std)
    restored = UnstandardizeImaged(["image", "target"])(item)
    torch.testing.assert_close(restored["image"], image)
    torch.testing.assert_close(restored["target"], target)


def test_a_constant_image_stays_finite():
    got, _, std = StandardizeImage()(torch.full((1, 4, 4), 3.0))
    assert torch.equal(got, torch.zeros(1, 4, 4))
    assert float(std) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ComplexToChannels()(x), r"complex of shape \(1, \*space\)"),
        (lambda x: ComplexToChannels()(x.to(torch.complex64)), r"complex of shape \(1, \*space\)"),
        (lambda x: ChannelsToComplex()(x), r"\(B, 2, \*space\)"),
        (lambda x: StandardizeImage()(x.to(torch.complex64)), "Turn complex images into channels"),
        (lambda x: StandardizeImage(0.0), "clamp"),
        (lambda x: StandardizeImaged(["a", "b"]), "one key"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(random(3, 4, 4))
