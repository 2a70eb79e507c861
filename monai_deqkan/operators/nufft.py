"""The forward model of non-Cartesian MRI, through the library FINUFFT."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from monai_deqkan._checks import check_finite, check_int, check_range, check_spatial_dims, check_tensor
from monai_deqkan.operators.base import LinearOperator, take_rows
from monai_deqkan.operators.coils import CoilOperator

__all__ = ["NUFFTOperator"]

_POWER_ITERATIONS = 30
_MARGIN = 1.01


class NUFFTOperator(LinearOperator):
    r"""Map an image to k-space along any trajectory: coils, non-uniform Fourier transform, weights.

    .. math:: (A x)_{kj} = \frac{\sqrt{w_j}}{c} \sum_r e^{-2 \pi i \sum_d k_{jd} r_d / n_d}\, S_k(r)\, x(r)

    with pixels :math:`r_d` counted from the centre ``n // 2``. The sums are computed to a tolerance; the adjoint is
    that of the computed map. The norm :math:`c` of the weighted transform is estimated by power iteration (30 steps
    from a fixed start, and 1 % added), so :math:`\|A\| \le 1` with normalized maps as far as that estimate, which comes
    from below, is right. Measured k-space has neither :math:`c` nor the weights: give the operator's equation what
    :meth:`weigh` returns.

    Needs the extra ``nufft``: ``pip install "monai-deqkan[nufft]"``, and ``cufinufft`` for data on a GPU.

    Args:
        trajectory: real, in cycles per field of view, shape ``(shots, samples, D)``, or ``(B, shots, samples, D)`` for
            trajectories per sample; ``D`` is 2 or 3, in the order of the image's axes.
        image_size: pixels :math:`n_d` per axis.
        sensitivity_maps: complex, shape ``(B or 1, K, *image_size)``, with map sets ``(B or 1, M, K, *image_size)``;
            None is a single coil with :math:`S = 1`.
        density: weights :math:`w_j` of the squared residual, not negative, shape ``(shots, samples)`` or ``(B, shots,
            samples)``; None weighs all alike. For radial sampling ``trajectory.norm(dim=-1)`` speeds convergence up.
        tolerance: relative error of the transform; single precision reaches about 1e-6.

    Raises:
        ImportError: if the library is missing.
        ValueError: if shapes do not fit, the trajectory is not finite or leaves the image's k-space.

    Reference:
        A. H. Barnett, J. F. Magland and L. af Klinteberg, "A parallel nonuniform fast Fourier transform library based
        on an 'exponential of semicircle' kernel", SIAM J. Sci. Comput. 41 (2019) C479-C504.
    """

    def __init__(
        self,
        trajectory: Tensor,
        image_size: Sequence[int],
        sensitivity_maps: Tensor | None = None,
        *,
        density: Tensor | None = None,
        tolerance: float = 1e-6,
    ) -> None:
        self.image_size = tuple(check_int("image_size", n) for n in image_size)
        self.spatial_dims = check_spatial_dims(len(self.image_size))
        self.trajectory = _per_sample("trajectory", trajectory, (*"SP", self.spatial_dims)).double()
        check_range("tolerance", tolerance, 1e-14, 0.1)
        half = torch.tensor([n / 2 for n in self.image_size], dtype=torch.float64, device=trajectory.device)
        if bool((self.trajectory.abs() > half * (1 + 1e-6)).any()):
            raise ValueError(
                f"`trajectory` must stay within half of `image_size` {self.image_size}, in cycles per field of view; "
                f"it reaches {self.trajectory.abs().amax(dim=(0, 1, 2)).tolist()}. Change its unit, or enlarge the "
                "image."
            )
        if sensitivity_maps is None:
            ones = (1,) * (self.spatial_dims + 2)
            sensitivity_maps = torch.ones(ones, dtype=torch.complex64, device=trajectory.device)
        self._coils = CoilOperator(sensitivity_maps, spatial_dims=self.spatial_dims)
        self._transforms = [_Transform(points, self.image_size, tolerance) for points in self.trajectory]
        root = torch.ones_like(self.trajectory[..., 0])
        if density is not None:
            root = _per_sample("density", density, tuple(self.trajectory.shape[1:-1])).to(root)
            if bool((root < 0).any()) or not bool(root.flatten(1).any(dim=1).all()):
                raise ValueError("`density` must not be negative, nor zero for all samples of a trajectory.")
            root = root.sqrt().expand(max(len(root), len(self.trajectory)), -1, -1)
        self._weights = root
        self._weights = root / self._norm().view(-1, 1, 1)  # (B or 1, shots, samples)

    @property
    def sensitivity_maps(self) -> Tensor:
        """The coil sensitivity maps."""
        return self._coils.sensitivity_maps

    @property
    def norm_bound(self) -> Tensor:
        """Upper bound of the norm per sample, that of the coils, as far as the transform's estimated norm holds."""
        return self._coils.norm_bound

    def weigh(self, kspace: Tensor) -> Tensor:
        r"""Return measured k-space in the operator's scale: multiplied by :math:`\sqrt{w_j} / c`.

        Args:
            kspace: complex, shape ``(B, K, shots, samples)``.

        Raises:
            TypeError: if it is not complex.
            ValueError: if it is not finite, or its shape does not fit.
        """
        self._check_kspace(kspace)
        check_finite("kspace", kspace, "Remove broken readouts, or give them no weight.")
        return kspace * self._weights.unsqueeze(1).to(kspace.real.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image ``(B, *space)``, or ``(B, M, *space)`` with map sets, to k-space ``(B, K, shots, samples)``."""
        coils = self._coils.forward(x)
        if tuple(coils.shape[2:]) != self.image_size:
            raise ValueError(f"NUFFTOperator needs images of size {self.image_size}; got shape {tuple(x.shape)}.")
        samples = self._apply(coils, adjoint=False)
        return samples * self._weights.unsqueeze(1).to(x.real.dtype)

    def adjoint(self, y: Tensor) -> Tensor:
        """Map k-space ``(B, K, shots, samples)`` to the combined image, of the shape that ``forward`` takes."""
        self._check_kspace(y)
        return self._coils.adjoint(self._apply(y * self._weights.unsqueeze(1).to(y.real.dtype), adjoint=True))

    def take(self, rows: Tensor) -> NUFFTOperator:
        """Return the operator of some samples of the batch."""
        part = copy(self)
        part._coils, part.trajectory = self._coils.take(rows), take_rows(self.trajectory, rows)
        part._weights = take_rows(self._weights, rows)
        kept = take_rows(torch.arange(len(self._transforms), device=rows.device), rows).tolist()
        part._transforms = [self._transforms[row] for row in kept]
        return part

    def _apply(self, data: Tensor, adjoint: bool) -> Tensor:
        """Apply the plain transform, or its adjoint, to each sample."""
        shared = len(self._transforms) == 1
        if not shared and len(data) != len(self._transforms):
            raise ValueError(
                f"NUFFTOperator has trajectories of {len(self._transforms)} samples; got a batch of {len(data)}."
            )
        sizes = self.image_size if adjoint else tuple(self.trajectory.shape[1:-1])
        rows = [
            _Apply.apply(row, self._transforms[0 if shared else b], adjoint).reshape(-1, *sizes)
            for b, row in enumerate(data)
        ]
        return torch.stack(rows)

    def _check_kspace(self, y: Tensor) -> None:
        if not check_tensor("kspace", y).is_complex():
            raise TypeError(f"NUFFTOperator needs a complex tensor; got {y.dtype}. Use `torch.complex`.")
        num_coils, shots = self._coils.sets.shape[2], tuple(self.trajectory.shape[1:-1])
        if tuple(y.shape[1:]) != (num_coils, *shots):
            raise ValueError(
                f"NUFFTOperator needs k-space of shape (B, K, shots, samples) = (B, {num_coils}, {shots[0]}, "
                f"{shots[1]}); got {tuple(y.shape)}. Coils are those of the maps."
            )

    def _norm(self) -> Tensor:
        """Estimate the norm of the weighted transform of one coil per trajectory, from below, and add a margin."""
        count = len(self._weights)
        start = torch.randn(1, *self.image_size, generator=torch.Generator().manual_seed(0), dtype=torch.complex64)
        x = start.to(self.trajectory.device).expand(count, -1, *self.image_size[1:]).unsqueeze(1)
        weights = self._weights.square().unsqueeze(1).float()
        square = torch.zeros(count)
        for _ in range(_POWER_ITERATIONS):
            x = x / x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
            x = self._apply(self._apply(x, adjoint=False) * weights, adjoint=True)
            square = x.flatten(1).norm(dim=1)
        return _MARGIN * square.double().sqrt()


class _Apply(torch.autograd.Function):
    """A linear transform of ``(K, *)`` whose gradient is its adjoint."""

    @staticmethod
    def forward(ctx: Any, data: Tensor, transform: _Transform, adjoint: bool) -> Tensor:
        ctx.transform, ctx.adjoint = transform, adjoint
        return transform.run(data.detach(), adjoint)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Apply.apply(grads[0], ctx.transform, not ctx.adjoint), None, None


class _Transform:
    """The library's transform along one trajectory ``(shots, samples, D)``; plans are made when first needed."""

    def __init__(self, trajectory: Tensor, image_size: tuple[int, ...], tolerance: float) -> None:
        sizes = torch.tensor(image_size, dtype=torch.float64, device=trajectory.device)
        self.points = (2 * math.pi * trajectory / sizes).reshape(-1, len(image_size))
        self.image_size, self.tolerance = image_size, tolerance
        self.library = _library(trajectory.device)
        self._plans: dict[tuple[int, int, torch.dtype], Any] = {}

    def run(self, data: Tensor, adjoint: bool) -> Tensor:
        """Transform ``(K, *image_size)`` to ``(K, points)``, or back by the adjoint."""
        count = data.shape[0]
        plan = self._plan(1 if adjoint else 2, count, data.dtype)
        data = data.reshape(count, -1) if adjoint else data.reshape(count, *self.image_size)
        data = (data if count > 1 else data[0]).contiguous()
        on_gpu = data.device.type == "cuda"
        result = plan.execute(data) if on_gpu else torch.from_numpy(plan.execute(data.numpy()))
        return result.reshape(count, *(self.image_size if adjoint else (-1,)))

    def _plan(self, kind: int, count: int, dtype: torch.dtype) -> Any:
        plan = self._plans.get((kind, count, dtype))
        if plan is None:
            single = dtype == torch.complex64
            on_gpu = self.points.device.type == "cuda"
            # The same kernel and grid both ways make the one exactly the adjoint of the other.
            options: dict[str, Any] = {"upsampfac": 2.0, "dtype": "complex64" if single else "complex128"}
            if not on_gpu:
                options["nthreads"] = torch.get_num_threads()
            plan = self.library.Plan(
                kind,
                self.image_size,
                n_trans=count,
                eps=max(self.tolerance, 1e-6) if single else self.tolerance,
                isign=-1 if kind == 2 else 1,
                **options,
            )
            points = self.points.to(torch.float32 if single else torch.float64).unbind(dim=1)
            plan.setpts(*(axis.contiguous() if on_gpu else axis.contiguous().numpy() for axis in points))
            self._plans[kind, count, dtype] = plan
        return plan


def _library(device: torch.device) -> Any:
    name = "cufinufft" if device.type == "cuda" else "finufft"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'NUFFTOperator needs the library {name}: run `pip install "monai-deqkan[nufft]"`'
            + (" and `pip install cufinufft`." if name == "cufinufft" else ".")
        ) from error


def _per_sample(name: str, value: Tensor, axes: tuple[str | int, ...]) -> Tensor:
    """Return per-sample data with its batch axis, which may be missing."""
    rank = len(axes)
    shaped = check_tensor(name, value).unsqueeze(0) if value.ndim == rank else value
    fits = shaped.ndim == rank + 1 and all(
        size == axis if isinstance(axis, int) else size > 0 for size, axis in zip(shaped.shape[1:], axes, strict=True)
    )
    if not fits or shaped.is_complex():
        expected = ", ".join(map(str, axes))
        raise ValueError(
            f"`{name}` must be real, of shape ({expected}) or (B, {expected}); got {value.dtype} of shape "
            f"{tuple(value.shape)}."
        )
    check_finite(name, shaped)
    return shaped
