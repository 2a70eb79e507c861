"""A group normalization that never moves two inputs apart."""

import torch.nn.functional as F
from torch import Tensor, nn

from monai_deqkan._checks import check_int, check_range

__all__ = ["NonexpansiveGroupNorm"]


class NonexpansiveGroupNorm(nn.GroupNorm):
    r"""Normalize groups of channels with a Lipschitz constant of at most one.

    .. math::
        y = \hat\gamma\, \sqrt{\epsilon}\, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta, \qquad
        \hat\gamma = \frac{\gamma}{\max(1, \max_c |\gamma_c|)}

    with mean :math:`\mu` and variance :math:`\sigma^2` of each sample over each group of channels and all space. Where
    :math:`\sigma^2 \ll \epsilon` it only takes the mean off; where :math:`\sigma^2 \gg \epsilon` it standardizes.

    Why it is nonexpansive: let a group have :math:`n` elements, :math:`u = x - \mu` and
    :math:`s = \sqrt{\sigma^2 + \epsilon}`. The Jacobian of :math:`u / s` is

    .. math:: \frac1s \Big( I - \frac{\mathbf 1 \mathbf 1^\top}{n} - \frac{u u^\top}{n s^2} \Big),

    symmetric, with the eigenvalues 0 along :math:`\mathbf 1`, :math:`\epsilon / s^3` along :math:`u`
    (as :math:`u^\top u = n \sigma^2`), and :math:`1 / s` across both: all at most :math:`1 / \sqrt{\epsilon}`, which a
    constant group reaches. Groups are disjoint, :math:`\sqrt\epsilon\, |\hat\gamma| \le \sqrt\epsilon`, and a map whose
    Jacobian norm is at most one everywhere is nonexpansive. The ordinary form, with :math:`\epsilon = 10^{-5}` and no
    factor of :math:`\sqrt\epsilon`, has the constant 316.

    In MONAI's networks: ``norm=("nonexpansive_group", {"num_groups": 8})``. Weights load from ``nn.GroupNorm``.

    Args:
        num_groups: number of groups.
        num_channels: number of channels, a multiple of ``num_groups``.
        eps: variance :math:`\epsilon` from which on it normalizes, in the squared unit of the input, positive.

    Raises:
        ValueError: if the channels do not divide into the groups, or ``eps`` is not positive.

    Example:
        >>> import torch
        >>> NonexpansiveGroupNorm(1, 2)(torch.tensor([[[0.0], [2.0]]])).flatten().detach()
        tensor([-0.7071,  0.7071])

    Reference:
        Y. Wu and K. He, "Group normalization", ECCV 2018; the factor and the bound of the weights are added.
    """

    def __init__(self, num_groups: int = 8, num_channels: int = 64, eps: float = 1.0) -> None:
        check_int("num_groups", num_groups)
        if check_int("num_channels", num_channels) % num_groups:
            raise ValueError(
                f"`num_channels` must be a multiple of `num_groups`; got {num_channels} channels and {num_groups} "
                "groups. Choose a number of groups that divides them."
            )
        check_range("eps", eps, 0.0, open_low=True, open_high=True)
        super().__init__(num_groups, num_channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(B, C, *space)``."""
        scale = self.eps**0.5 / self.weight.abs().max().clamp(min=1.0)
        return F.group_norm(input, self.num_groups, self.weight * scale, self.bias, self.eps)
