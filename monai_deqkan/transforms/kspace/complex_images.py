"""Complex images of one item as channels, and their standardization, in array and dictionary form."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform, Transform
from torch import Tensor

from monai_deqkan._checks import check_range, check_tensor
from monai_deqkan._complex import channels_to_complex, complex_to_channels
from monai_deqkan.transforms.kspace.checks import one_key

__all__ = [
    "ChannelsToComplex",
    "ChannelsToComplexd",
    "ComplexToChannels",
    "ComplexToChannelsd",
    "ImageMagnitude",
    "ImageMagnituded",
    "StandardizeImage",
    "StandardizeImaged",
    "UnstandardizeImage",
    "UnstandardizeImaged",
]

Item = dict[Hashable, Any]


class ComplexToChannels(Transform):
    """Turn a complex image ``(1, *space)`` into two real channels ``(2, *space)``: real part, imaginary part."""

    def __call__(self, image: Tensor) -> Tensor:
        """Turn the image.

        Raises:
            ValueError: if it is not complex with one channel.
        """
        if not check_tensor("image", image).is_complex() or image.shape[:1] != (1,):
            raise ValueError(f"`image` must be complex of shape (1, *space); got {image.dtype}, {tuple(image.shape)}.")
        return complex_to_channels(image)[0]


class ChannelsToComplex(Transform):
    """Turn two real channels ``(2, *space)`` into a complex image ``(1, *space)``."""

    def __call__(self, image: Tensor) -> Tensor:
        """Turn the image.

        Raises:
            ValueError: if it does not have two channels.
        """
        return channels_to_complex(check_tensor("image", image).unsqueeze(0))


class ImageMagnitude(Transform):
    """Turn a complex image as two channels into its magnitude, in the same unit."""

    def __call__(self, image: Tensor) -> Tensor:
        """Turn ``(2, *space)`` into ``(1, *space)``."""
        return channels_to_complex(check_tensor("image", image).unsqueeze(0)).abs()


class StandardizeImage(Transform):
    r"""Give an image zero mean and unit standard deviation, and clamp what lies far out.

    .. math:: x' = \max(-c, \min(c, (x - \mu) / \sigma))

    with one mean per channel and one standard deviation over all channels, so that a complex image as two channels is
    shifted and scaled as a complex number. For one channel it is fastMRI's instance normalization. Because it shifts,
    networks that are homogeneous (such as those of this project) take :class:`NormalizeKspace` instead.

    Args:
        clamp: the limit :math:`c` in standard deviations; None does not clamp. What is clamped is lost to
            :class:`UnstandardizeImage`.
    """

    def __init__(self, clamp: float | None = 6.0) -> None:
        self.clamp = None if clamp is None else check_range("clamp", clamp, 0.0, open_low=True)

    def __call__(self, image: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> tuple[Tensor, ...]:
        """Standardize an image.

        Args:
            image: real, shape ``(C, *space)``, any unit.
            mean: of another image in the same unit, to standardize this one like it; needs ``std``.
            std: of another image, likewise.

        Returns:
            The image, dimensionless, its mean ``(C, *ones)`` and its standard deviation, a scalar (one for a constant
            image), both in its old unit.

        Raises:
            ValueError: if the image is complex or has no axis of space.
        """
        if check_tensor("image", image).is_complex() or image.ndim < 2:
            raise ValueError(
                f"`image` must be real of shape (C, *space); got {image.dtype} of shape {tuple(image.shape)}. Turn "
                "complex images into channels first."
            )
        if mean is None or std is None:
            mean = image.mean(dim=tuple(range(1, image.ndim)), keepdim=True)
            std = (image - mean).std()
            std = std.where(std > 0, std.new_ones(()))
        standard = (image - mean) / std
        return (standard if self.clamp is None else standard.clamp(-self.clamp, self.clamp)), mean, std


class UnstandardizeImage(Transform):
    """Undo :class:`StandardizeImage`: give an image back its mean and standard deviation."""

    def __call__(self, image: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Tensor:
        """Return ``image * std + mean``, in the old unit."""
        return check_tensor("image", image) * std + mean


class ComplexToChannelsd(MapTransform):
    """Turn complex images into channels; see :class:`ComplexToChannels`.

    Args:
        keys: keys of images.
        allow_missing_keys: whether to skip absent keys.
    """

    array: type[Transform] = ComplexToChannels

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.turn = self.array()

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Turn all keys."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self.turn(item[key])
        return item


class ChannelsToComplexd(ComplexToChannelsd):
    """Turn channels into complex images; see :class:`ChannelsToComplex`.

    Args:
        keys: keys of images.
        allow_missing_keys: whether to skip absent keys.
    """

    array = ChannelsToComplex


class ImageMagnituded(ComplexToChannelsd):
    """Turn complex images as two channels into magnitudes; see :class:`ImageMagnitude`.

    Args:
        keys: keys of images.
        allow_missing_keys: whether to skip absent keys.
    """

    array = ImageMagnitude


class StandardizeImaged(MapTransform):
    """Standardize an image, and others by the same numbers; see :class:`StandardizeImage`.

    Args:
        keys: key of the image that sets mean and standard deviation, one.
        also: keys of other images in the same unit and with as many channels, such as the target; absent ones are
            skipped.
        clamp: see :class:`StandardizeImage`.
        mean_key: key for the mean.
        std_key: key for the standard deviation.
        allow_missing_keys: whether to skip an absent key.
    """

    def __init__(
        self,
        keys: KeysCollection,
        also: Sequence[str] = (),
        clamp: float | None = 6.0,
        mean_key: str = "mean",
        std_key: str = "std",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(one_key(keys), allow_missing_keys)
        self.also = tuple(also)
        self.mean_key, self.std_key = mean_key, std_key
        self.standardize = StandardizeImage(clamp)

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Standardize."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key], mean, std = self.standardize(item[key])
            item[self.mean_key], item[self.std_key] = mean, std
            for other in self.also:
                if other in item:
                    item[other] = self.standardize(item[other], mean, std)[0]
        return item


class UnstandardizeImaged(MapTransform):
    """Undo :class:`StandardizeImaged` for an image and what a network made of it.

    Args:
        keys: keys of images.
        mean_key: key of the mean.
        std_key: key of the standard deviation.
        allow_missing_keys: whether to skip absent keys.
    """

    def __init__(
        self, keys: KeysCollection, mean_key: str = "mean", std_key: str = "std", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mean_key, self.std_key = mean_key, std_key
        self.restore = UnstandardizeImage()

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Restore all keys."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self.restore(item[key], item[self.mean_key], item[self.std_key])
        return item
