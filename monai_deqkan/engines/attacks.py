"""Attacks on classifiers by the gradient of their images, and a check that this gradient is the true one."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_range
from monai_deqkan.adjoints import UnrolledAdjoint
from monai_deqkan.engines.corruptions import check_unit_images, image_generators
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.networks.layers.kan_inputs import evaluation_mode
from monai_deqkan.solvers import solve_budget

__all__ = ["attack_gradient_error", "check_labels", "class_logits", "fgsm_attack", "pgd_attack"]


def fgsm_attack(network: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    r"""Move every pixel by ``epsilon`` to where the loss of the true class grows.

    .. math:: x' = \mathrm{clip}_{[0, 1]}\big(x + \epsilon\, \mathrm{sign}\, \nabla_x \ell(x)\big)

    The network runs in evaluation mode; its parameters and their gradients are left alone. An equilibrium is
    differentiated by its layer's own adjoint: see :func:`attack_gradient_error`.

    Args:
        network: returns logits ``(B, classes)``, or ``(B, 1)`` for the second of two classes.
        images: intensities in [0, 1], shape ``(B, C, *space)``, on the network's device.
        labels: true classes, integers ``(B,)``.
        epsilon: largest change of a pixel, in units of the intensity range.

    Returns:
        Attacked images of the same shape.

    Raises:
        TypeError: if images or labels are of another kind.
        ValueError: if shapes do not fit, images lie outside [0, 1], or ``epsilon`` is negative.

    Reference:
        I. Goodfellow, J. Shlens and C. Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015.
    """
    check_range("epsilon", epsilon, 0.0, 1.0)
    images = check_unit_images(images)
    labels = check_labels(labels, len(images)).to(images.device)
    with evaluation_mode(network):
        return (images + epsilon * _input_gradient(network, images, labels).sign()).clamp(0, 1)


def pgd_attack(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    num_steps: int = 10,
    step_size: float | None = None,
    seed: int = 0,
    first_index: int = 0,
) -> Tensor:
    r"""Climb the loss of the true class from a random start, within ``epsilon`` of each pixel.

    .. math:: x_{k+1} = \mathrm{clip}_{[0, 1]}\, \Pi_\epsilon \big(x_k + s\, \mathrm{sign}\, \nabla_x \ell(x_k)\big)

    with :math:`\Pi_\epsilon` the projection onto the box of half-width :math:`\epsilon` around the image. The last
    iterate is returned. Otherwise as :func:`fgsm_attack`.

    Args:
        network: see :func:`fgsm_attack`.
        images: see :func:`fgsm_attack`.
        labels: see :func:`fgsm_attack`.
        epsilon: largest change of a pixel, in units of the intensity range.
        num_steps: number of steps.
        step_size: :math:`s`; ``2.5 * epsilon / num_steps`` by default.
        seed: sets the random starts, together with each image's number.
        first_index: number of the first image in its data set, where that comes in batches.

    Returns:
        Attacked images of the same shape.

    Raises:
        TypeError: if images or labels are of another kind.
        ValueError: if shapes do not fit, images lie outside [0, 1], or a number lies outside its range.

    Reference:
        A. Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018.
    """
    check_range("epsilon", epsilon, 0.0, 1.0)
    check_int("num_steps", num_steps)
    step = 2.5 * epsilon / num_steps if step_size is None else check_range("step_size", step_size, 0.0)
    images = check_unit_images(images)
    labels = check_labels(labels, len(images)).to(images.device)
    generators = image_generators("pgd", seed, first_index, len(images))
    noise = torch.stack([torch.rand(images.shape[1:], generator=generator) for generator in generators])
    attacked = (images + epsilon * (2 * noise.to(images) - 1)).clamp(0, 1)
    with evaluation_mode(network):
        for _ in range(num_steps):
            attacked = attacked + step * _input_gradient(network, attacked, labels).sign()
            attacked = torch.minimum(torch.maximum(attacked, images - epsilon), images + epsilon).clamp(0, 1)
    return attacked


def attack_gradient_error(network: nn.Module, images: Tensor, labels: Tensor, *, rtol: float = 1e-6) -> Tensor:
    r"""Compare the gradient that attacks use with that through every step of a tighter solve.

    .. math:: \|g - g_\mathrm{unrolled}\|_2 \,/\, \|g_\mathrm{unrolled}\|_2

    A large value would mean that the network looks robust because its gradient is wrong. The reference is a copy with
    the adjoint ``"unrolled"`` in each :class:`~monai_deqkan.networks.layers.DEQLayer`, solved to ``rtol``.

    Args:
        network: see :func:`fgsm_attack`; holds at least one ``DEQLayer``.
        images: see :func:`fgsm_attack`.
        labels: see :func:`fgsm_attack`.
        rtol: relative tolerance of the reference's solves; they get up to 500 evaluations.

    Returns:
        One relative error per image, ``(B,)``, dimensionless; NaN where the true gradient is zero.

    Raises:
        ValueError: if the network has no ``DEQLayer``, or see :func:`fgsm_attack`.
        TypeError: see :func:`fgsm_attack`.
    """
    images = check_unit_images(images)
    labels = check_labels(labels, len(images)).to(images.device)
    reference = copy.deepcopy(network)
    layers = [part for part in reference.modules() if isinstance(part, DEQLayer)]
    if not layers:
        raise ValueError(f"{type(network).__name__} has no DEQLayer: its gradient is exact, nothing is to be compared.")
    for layer in layers:
        layer.adjoint = UnrolledAdjoint()
    with evaluation_mode(network), evaluation_mode(reference):
        gradient = _input_gradient(network, images, labels).flatten(1)
        with solve_budget(rtol=rtol, max_iter=500, on_failure="ignore"):
            expected = _input_gradient(reference, images, labels).flatten(1)
    return (gradient - expected).norm(dim=1) / expected.norm(dim=1)


def class_logits(logits: Tensor, count: int) -> Tensor:
    """Return logits ``(B, classes)``; a single one, of the second of two classes, gets a zero beside it.

    Raises:
        ValueError: if the network returned another shape than ``(count, classes)``.
    """
    if logits.ndim != 2 or len(logits) != count or logits.shape[1] < 1:
        raise ValueError(f"The network must return logits of shape ({count}, classes); got {tuple(logits.shape)}.")
    logits = logits.as_subclass(Tensor)
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def check_labels(labels: Tensor, count: int) -> Tensor:
    """Return ``labels`` as integers ``(count,)``.

    Raises:
        TypeError: if they are no tensor of integers.
        ValueError: if there is not one for each image, or one is negative.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(
            f"`labels` must be a tensor of class numbers; got {getattr(labels, 'dtype', type(labels).__name__)}."
        )
    labels = labels.as_subclass(Tensor)
    if labels.shape != (count,) or bool((labels < 0).any()):
        raise ValueError(f"`labels` must be class numbers from 0 of shape ({count},); got shape {tuple(labels.shape)}.")
    return labels.long()


def _input_gradient(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the summed cross-entropy: of each image its own, whatever the batch."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        loss = F.cross_entropy(class_logits(network(images), len(images)), labels, reduction="sum")
        return torch.autograd.grad(loss, images)[0]
