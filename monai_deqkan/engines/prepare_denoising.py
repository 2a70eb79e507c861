"""From a batch of images to noisy complex images and the clean ones: the training of a denoiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.handlers import IgniteMetricHandler
from torch import Tensor

from monai_deqkan._checks import check_finite, check_int, check_range, check_tensor
from monai_deqkan._complex import channels_to_complex, complex_to_channels
from monai_deqkan.metrics import ReferencePSNRMetric
from monai_deqkan.operators.simulate import quadratic_terms

__all__ = ["PrepareBatchDenoising", "denoising_metrics", "unit_image"]


class PrepareBatchDenoising(PrepareBatch):
    r"""Give images a random smooth phase and complex Gaussian noise, on the device, for MONAI's supervised engines.

    The batch has ``image`` ``(B, 1, *space)`` (magnitudes) or ``(B, 2, *space)`` (real and imaginary part), with a
    largest magnitude of about 1, as :func:`unit_image` makes it. The network is called as
    ``network(noisy, noise_level=...)``, or ``network(noisy)``; the target is ``(clean, noise_level)``, as
    :class:`~monai_deqkan.losses.DenoisingLoss` takes it. Switch the engines' ``decollate`` off.

    Args:
        takes_noise_level: whether the network is told the standard deviation of the noise in each channel.
        noise_range: lowest and highest standard deviation of the noise in each channel, in the unit of the images; each
            sample's is drawn log-uniformly.
        noise_levels: fixed levels in place of random ones, for validation: the batch becomes ``len(noise_levels)``
            times as large, with all levels of an image in a row.
        phase_prob: share of the samples that get a phase: a random polynomial of second degree in the coordinates.
        max_phase: largest absolute phase, in radians; each sample's largest phase is drawn below it.
        inversion_prob: share of the samples whose magnitude :math:`m` becomes :math:`1 - m`.
        seed: makes phase and noise the same in every call, for validation; None takes torch's global generator.

    Raises:
        ValueError: for a range or a probability that is none.

    Example:
        >>> prepare = PrepareBatchDenoising(noise_levels=[0.02, 0.1], seed=0)
        >>> noisy, (clean, level), _, settings = prepare({"image": torch.ones(3, 1, 8, 8)})
        >>> noisy.shape, level[:2].tolist() == settings["noise_level"][:2].tolist()
        (torch.Size([6, 2, 8, 8]), True)
    """

    def __init__(
        self,
        takes_noise_level: bool = True,
        noise_range: Sequence[float] = (0.005, 0.2),
        *,
        noise_levels: Sequence[float] | None = None,
        phase_prob: float = 0.8,
        max_phase: float = math.pi,
        inversion_prob: float = 0.0,
        seed: int | None = None,
    ) -> None:
        if len(noise_range) != 2:
            raise ValueError(f"`noise_range` must be a lowest and a highest level; got {tuple(noise_range)}.")
        low, high = (check_range("noise_range", end, 0.0, open_low=True, open_high=True) for end in noise_range)
        if low > high:
            raise ValueError(f"`noise_range` must be a lowest and a highest level; got {tuple(noise_range)}. Turn it.")
        self.takes_noise_level = takes_noise_level
        self.log_range = (math.log(low), math.log(high))
        self.noise_levels = None if noise_levels is None else torch.tensor([float(level) for level in noise_levels])
        if self.noise_levels is not None and not (len(self.noise_levels) and all(map(_is_level, self.noise_levels))):
            raise ValueError(f"`noise_levels` must be positive and finite, one at least; got {noise_levels}.")
        self.phase_prob = check_range("phase_prob", phase_prob, 0.0, 1.0)
        self.max_phase = check_range("max_phase", max_phase, 0.0, open_high=True)
        self.inversion_prob = check_range("inversion_prob", inversion_prob, 0.0, 1.0)
        self.seed = None if seed is None else check_int("seed", seed, minimum=0)

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[()], dict[str, Tensor]]:
        """Move to ``device``, and make phase and noise there; ``kwargs`` go to :meth:`torch.Tensor.to`, as in MONAI.

        Raises:
            KeyError: if the batch has no ``image``.
            ValueError: if the images have neither one channel nor two.
        """
        if "image" not in batchdata:
            raise KeyError(f"A batch for denoising needs the key 'image'; got {sorted(map(str, batchdata))}.")
        image = check_tensor("image", batchdata["image"]).as_subclass(Tensor)
        if image.ndim < 4 or image.shape[1] not in (1, 2):
            raise ValueError(f"`image` must have shape (B, 1, *space) or (B, 2, *space); got {tuple(image.shape)}.")
        image = image.to(device=device, non_blocking=non_blocking, **kwargs)
        draw = _Draw(image.device, self.seed)
        clean = channels_to_complex(image) if image.shape[1] == 2 else torch.complex(image[:, 0], 0 * image[:, 0])
        clean = self._inverted(clean, draw)
        clean = complex_to_channels(clean * self._phase(clean, draw))
        if self.noise_levels is None:
            low, high = self.log_range
            level = torch.exp(low + (high - low) * draw.uniform(len(clean)))
        else:
            level = self.noise_levels.to(clean).repeat(len(clean))
            clean = clean.repeat_interleave(len(self.noise_levels), dim=0)
        noisy = clean + _as_column(level, clean) * draw.normal(*clean.shape)
        return noisy, (clean, level), (), {"noise_level": level} if self.takes_noise_level else {}

    def _inverted(self, image: Tensor, draw: _Draw) -> Tensor:
        if self.inversion_prob == 0:
            return image
        magnitude = image.abs()
        inverted = torch.polar((1 - magnitude).clamp_min(0), image.angle())
        return torch.where(_as_column(draw.uniform(len(image)) < self.inversion_prob, image), inverted, image)

    def _phase(self, image: Tensor, draw: _Draw) -> Tensor:
        """Return unit complex numbers ``(B, *space)``."""
        space = image.shape[1:]
        axes = [torch.linspace(-1, 1, size, device=image.device) for size in space]
        terms = quadratic_terms(torch.meshgrid(*axes, indexing="ij"))
        phase = torch.einsum("bt,t...->b...", draw.normal(len(image), len(terms)), torch.stack(terms))
        size = self.max_phase * draw.uniform(len(image)) * (draw.uniform(len(image)) < self.phase_prob)
        phase = phase * _as_column(size / phase.flatten(1).abs().amax(dim=1), phase)
        return torch.polar(torch.ones_like(phase), phase)


class _Draw:
    """Random numbers on a device: of its own generator, or the same in every call from a seed, whatever the device."""

    def __init__(self, device: torch.device, seed: int | None) -> None:
        self.device = device
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.source = device if seed is None else torch.device("cpu")

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.source).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.source).to(self.device)


def _as_column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _is_level(level: Tensor) -> bool:
    return 0 < float(level) < math.inf


def unit_image(image: Tensor) -> Tensor:
    """Return one item's image with a largest magnitude of 1, as real and imaginary part.

    Args:
        image: magnitudes ``(1, *space)``, or real and imaginary part ``(2, *space)``, any unit.

    Returns:
        Plain float32 tensor ``(2, *space)``, dimensionless; zeros stay zeros.

    Raises:
        ValueError: if it has neither one channel nor two, or a value is not finite.
    """
    if check_tensor("image", image).ndim < 1 or image.shape[0] not in (1, 2):
        raise ValueError(f"`image` must have shape (1, *space) or (2, *space); got {tuple(image.shape)}.")
    image = image.as_subclass(Tensor).float()
    check_finite("image", image, "Take broken images out of the data set.")
    if len(image) == 1:
        image = torch.cat((image, torch.zeros_like(image)))
    largest = image.abs().amax()
    if largest == 0:
        return image
    image = image / largest  # so that squares stay inside float32's range, whatever the unit
    return image / image.square().sum(dim=0).amax().sqrt()


def denoising_metrics(noise_levels: Sequence[float]) -> dict[str, IgniteMetricHandler]:
    """Return one metric ``val_psnr_<level>`` per noise level of a :class:`PrepareBatchDenoising`, in dB.

    It is :class:`~monai_deqkan.metrics.ReferencePSNRMetric`, of magnitudes, over the samples of that level.
    """
    count = len(noise_levels)

    def of_level(index: int) -> IgniteMetricHandler:
        def output_transform(output: dict[str, Any]) -> tuple[Tensor, Tensor]:
            return output["pred"][index::count], output["label"][0][index::count]

        return IgniteMetricHandler(metric_fn=ReferencePSNRMetric(), output_transform=output_transform)

    return {f"val_psnr_{level:g}": of_level(index) for index, level in enumerate(noise_levels)}
