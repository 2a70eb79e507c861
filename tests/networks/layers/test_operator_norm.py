from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from monai_deqkan.networks.layers.operator_norm import conv_norm_bound, linear_norm_bound, padding_gain

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def dense_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest singular value of the explicit matrix of a linear map, in float64."""
    count = math.prod(shape)
    with torch.no_grad():
        columns = layer(torch.eye(count, dtype=torch.float64).reshape(count, *shape))
    return float(torch.linalg.matrix_norm(columns.reshape(count, -1), ord=2))


def make_conv(weight: Tensor, groups: int = 1, **settings: object) -> nn.Module:
    out, in_per_group, *kernel = weight.shape
    conv = CONVS[len(kernel) - 1](in_per_group * groups, out, tuple(kernel), groups=groups, bias=False, **settings)
    conv = conv.double()
    conv.weight.data.copy_(weight)
    return conv


def kernels(kind: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(shape, generator=generator)
    if kind == "random":
        return noise
    if kind == "smooth":
        return noise[(..., *(slice(0, 1) for _ in shape[2:]))].expand(shape) * (1 + 0.1 * noise)
    if kind == "high-frequency":  # peaks between grid points: alternating signs, modulated
        position = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape[2:]), indexing="ij")).sum(0)
        return noise[(..., *(slice(0, 1) for _ in shape[2:]))] * torch.cos(2.83 * position)
    if kind == "dirac":
        return nn.init.dirac_(torch.empty(shape))
    return torch.ones(shape)  # "constant"


@pytest.mark.parametrize("kind", ["random", "smooth", "high-frequency", "dirac", "constant"])
@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((4, 3, 3), (40,)),
        ((3, 5, 4), (40,)),
        ((3, 4, 3, 3), (12, 11)),
        ((2, 2, 2, 5), (11, 12)),
        ((2, 2, 3, 3, 3), (6, 6, 6)),
    ],
)
def test_conv_bound_is_sound_for_dense_matrices(kind: str, shape: tuple[int, ...], image: tuple[int, ...]) -> None:
    weight = kernels(kind, shape)
    bound = float(conv_norm_bound(weight))
    half = tuple(n // 2 for n in shape[2:])
    full = tuple(n - 1 for n in shape[2:])
    for padding in (half, full):
        assert dense_norm(make_conv(weight, padding=padding), (shape[1], *image)) <= bound
    assert dense_norm(make_conv(weight, stride=2, padding=full), (shape[1], *image)) <= bound
    if all(n % 2 for n in shape[2:]):
        circular = make_conv(weight, padding=half, padding_mode="circular")
        assert dense_norm(circular, (shape[1], *image)) <= bound


@pytest.mark.parametrize("dilation", [2, 3])
def test_dilation_does_not_change_the_bound(dilation: int) -> None:
    weight = kernels("random", (3, 3, 3, 3))
    conv = make_conv(weight, dilation=dilation, padding=dilation)
    exact = dense_norm(conv, (3, 18, 18))
    assert 0.9 * float(conv_norm_bound(weight)) < exact <= float(conv_norm_bound(weight))


@pytest.mark.parametrize("groups", [2, 4])
def test_groups(groups: int) -> None:
    weight = kernels("random", (8, 4 // groups, 3, 3))
    bound = float(conv_norm_bound(weight, groups=groups))
    exact = dense_norm(make_conv(weight, groups=groups, padding=2), (4, 14, 14))
    assert 0.9 * bound < exact <= bound


@pytest.mark.parametrize(
    ("shape", "slack"), [((8, 8, 3), 1.011), ((32, 32, 3, 3), 1.026), ((16, 16, 5, 5), 1.026), ((4, 4, 3, 3, 3), 1.051)]
)
@pytest.mark.parametrize("kind", ["random", "smooth", "dirac"])
def test_bound_is_tight_against_a_fine_frequency_grid(shape: tuple[int, ...], slack: float, kind: str) -> None:
    weight = kernels(kind, shape)
    axes = len(shape) - 2
    size = (2000, 64, 32)[axes - 1]
    transfer = torch.fft.fftn(weight.double(), s=(size,) * axes).reshape(*shape[:2], -1).permute(2, 0, 1)
    if axes > 1:
        transfer = transfer[: len(transfer) // 2 + size * (axes == 2) + size**2 * (axes == 3)]
    exact = float(torch.linalg.svdvals(transfer).max())
    assert exact <= float(conv_norm_bound(weight)) <= slack * exact


def test_more_frequencies_tighten_the_bound() -> None:
    weight = kernels("high-frequency", (3, 3, 3, 3))
    coarse, fine = (float(conv_norm_bound(weight, num_frequencies=n)) for n in (4, 200))
    exact = dense_norm(make_conv(weight, padding=2), (3, 16, 16))
    assert exact <= fine < coarse
    assert fine < 1.06 * exact  # no image of 16 x 16 reaches the norm over all sizes


def test_peak_between_grid_points_is_covered() -> None:
    kernel = torch.tensor([[[1.0, 0.0, -1.0]]])  # largest at a quarter cycle, which a grid of 3 misses
    assert float(torch.fft.fft(kernel, n=3).abs().max()) < 1.74
    for count in range(3, 12):
        assert float(conv_norm_bound(kernel, num_frequencies=count)) >= 2.0


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 4), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_bound_against_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = float(np.linalg.norm(weight.double().numpy(), 2))
    slack = 1e-5 if dtype != torch.bfloat16 else 0.2
    assert exact <= float(linear_norm_bound(weight)) <= exact * (1 + slack)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_bounds_scale_with_the_weight(scale: float) -> None:
    weight = kernels("random", (4, 4, 3, 3))
    assert float(conv_norm_bound(weight * scale)) == pytest.approx(scale * float(conv_norm_bound(weight)), rel=1e-5)


def test_zero_and_nonfinite_weights() -> None:
    weight = torch.zeros(3, 2, 3, 3, requires_grad=True)
    bound = conv_norm_bound(weight)
    bound.backward()
    assert float(bound.detach()) == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert math.isnan(float(conv_norm_bound(torch.full((2, 2, 3), float("nan")))))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3), (3, 2, 3, 3), (2, 2, 3, 1, 3)])
def test_gradient_against_finite_differences(shape: tuple[int, ...]) -> None:
    weight = kernels("random", shape).double() if len(shape) > 2 else torch.randn(shape, dtype=torch.float64)
    bound = linear_norm_bound if len(shape) == 2 else conv_norm_bound
    assert torch.autograd.gradcheck(bound, (weight.requires_grad_(),), eps=1e-6, atol=1e-5)


def test_bound_ignores_autocast() -> None:
    weight = kernels("random", (4, 4, 3, 3))
    plain = float(conv_norm_bound(weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(conv_norm_bound(weight)) == plain


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"\(out, in\)"):
        linear_norm_bound(torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="kernel"):
        conv_norm_bound(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="groups"):
        conv_norm_bound(torch.zeros(3, 2, 3), groups=2)
    with pytest.raises(ValueError, match="num_frequencies"):
        conv_norm_bound(torch.zeros(3, 2, 3), num_frequencies=2)


@pytest.mark.parametrize("kind", ["random", "constant", "high-frequency"])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_gain_is_sound_for_dense_matrices(kind: str, mode: str) -> None:
    for taps, dilation, padding in itertools.product((1, 2, 3, 5), (1, 2), (0, 1, 2, 3, "same", "valid")):
        weight = kernels(kind, (2, 2, taps))
        conv = make_conv(weight, padding=padding, padding_mode=mode, dilation=dilation)
        bound = float(conv_norm_bound(weight)) * padding_gain(conv)
        width = dilation * (taps - 1) - dilation * (taps - 1) // 2 if padding == "same" else padding
        width = 0 if padding == "valid" else width
        smallest = {"reflect": width + 1, "replicate": 1, "circular": max(width, 1)}[mode]
        for size in range(smallest, smallest + 6):
            if size + 2 * width > dilation * (taps - 1):
                assert dense_norm(conv, (2, size)) <= bound, (taps, dilation, padding, size)


@pytest.mark.parametrize(("mode", "gain"), [("zeros", 1), ("circular", 1), ("reflect", 2), ("replicate", 2)])
def test_padding_gain_in_two_dimensions(mode: str, gain: float) -> None:
    for weight in (kernels("random", (3, 3, 3, 3)), torch.eye(9).reshape(9, 1, 3, 3)):
        conv = make_conv(weight, padding=1, padding_mode=mode)
        assert padding_gain(conv) == pytest.approx(gain)
        for size in ((2, 2), (2, 3), (3, 3), (5, 7)):
            assert dense_norm(conv, (weight.shape[1], *size)) <= gain * float(conv_norm_bound(weight))


def test_padding_gain_is_needed() -> None:
    """Shifts by one pixel, side by side: at a replicated border nine outputs see one corner."""
    weight = torch.zeros(2, 1, 3)
    weight[0, 0, 0] = weight[1, 0, 1] = 1
    conv = make_conv(weight, padding=1, padding_mode="replicate")
    assert dense_norm(conv, (1, 8)) > 1.2 * math.sqrt(2) > float(conv_norm_bound(weight))
