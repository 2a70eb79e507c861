"""MONAI's networks with KAN layers: built that way, or turned into it afterwards."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from monai.networks.blocks import MemoryEfficientSwish, Swish
from monai.networks.layers.factories import Conv
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from monai_deqkan._checks import check_choice, did_you_mean
from monai_deqkan.networks.layers import BASES, Basis, KANActivation, KANConv1d, KANConv2d, KANConv3d, KANLinear
from monai_deqkan.networks.layers.basis import BasisSpec, build_basis

__all__ = ["KANReplacement", "kan_convolutions", "to_kan"]

_logger = logging.getLogger(__name__)

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv1d: KANConv1d,
    nn.Conv2d: KANConv2d,
    nn.Conv3d: KANConv3d,
}
_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Softplus,
    MemoryEfficientSwish,
    Swish,
)

Skip: TypeAlias = str | type[nn.Module] | Sequence[str | type[nn.Module]] | Callable[[str, nn.Module], bool]


# --- while a network is built ---


class _ConvolutionType(type):
    """Type of the stand-ins for ``nn.ConvNd`` that build KAN convolutions.

    MONAI's networks use the class they get in two ways: they call it, and they look for its instances to draw their
    weights as suits plain convolutions. So KAN convolutions, which have their own, are not among its instances.
    """

    plain: type[nn.Module]
    settings: dict[str, Any]
    skip_pointwise: bool

    def __call__(cls, *args: Any, **kwargs: Any) -> nn.Module:  # with the arguments of nn.ConvNd
        size = kwargs.get("kernel_size", args[2] if len(args) > 2 else ())
        if cls.skip_pointwise and _is_pointwise(size):
            return cls.plain(*args, **kwargs)
        return _CONVOLUTIONS[cls.plain](*args, **kwargs, **cls.settings)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.plain)


_active: ContextVar[list[Any] | None] = ContextVar("monai_deqkan_convolutions", default=None)
_lock = threading.Lock()
_open = 0
_original: Any = None


def _convolution_of(dim: int) -> Any:
    """Return what ``Conv["conv", dim]`` is now, in this thread or task."""
    kinds = _active.get()
    return _original.value(dim) if kinds is None else kinds[dim - 1]


@contextmanager
def kan_convolutions(
    *,
    basis: BasisSpec = "bspline",
    grid_size: int = 5,
    spline_order: int = 3,
    grid_range: tuple[float, float] = (-3.0, 3.0),
    outside: str | None = None,
    base_activation: str | None = "silu",
    init: str = "variance",
    skip_pointwise: bool = False,
) -> Iterator[None]:
    """Make MONAI's networks use KAN convolutions where they are built inside of this ``with`` block.

    Every convolution that MONAI's layer factory is asked for, ``Conv["conv", dim]``, becomes a `KANConv1d`,
    `KANConv2d` or `KANConv3d`. Not transposed ones, and not the few that a network takes from ``torch.nn`` itself: for
    these see `to_kan`. Weights are drawn by the KAN layer; what a network does to the weights of its plain
    convolutions is not done to them. Blocks can be nested, the inner one's settings count. Other threads and tasks
    are not affected.

    Args:
        basis: the functions: a name, a pair ``(name, settings)``, or a `Basis`.
        grid_size: number of intervals of the grid, for a basis given by name.
        spline_order: order of its splines.
        grid_range: first and last knot, in the unit of a layer's inputs.
        outside: how the functions go on outside of the grid; ``None`` for the basis's own default.
        base_activation: ``"silu"``, or ``None`` to leave the base term out.
        init: initialization of the layers, ``"variance"``, ``"identity"`` or ``"zero_spline"``.
        skip_pointwise: whether convolutions with a kernel of one element stay ordinary ones.

    Raises:
        ValueError: if a setting is out of its range.
        TypeError: if one is of the wrong kind.

    Example:
        >>> from monai.networks.nets import BasicUNet
        >>> with kan_convolutions(grid_size=4):
        ...     network = BasicUNet(spatial_dims=2, features=(4, 4, 8, 8, 8, 4))
        >>> type(network.conv_0.conv_0.conv).__name__
        'KANConv2d'
    """
    global _open, _original
    settings: dict[str, Any] = {
        "basis": basis,
        "grid_size": grid_size,
        "spline_order": spline_order,
        "grid_range": grid_range,
        "outside": outside,
        "base_activation": base_activation,
        "init": init,
    }
    KANConv1d(1, 1, 1, **settings)  # says now what is wrong with a setting
    kinds = []
    for plain in _CONVOLUTIONS:
        kind = _ConvolutionType(f"KAN{plain.__name__}Factory", (), {})
        kind.plain, kind.settings, kind.skip_pointwise = plain, settings, skip_pointwise
        kinds.append(kind)
    with _lock:
        if _open == 0:
            _original = Conv.components["CONV"]
            Conv.components["CONV"] = _original._replace(value=_convolution_of)
        _open += 1
    token = _active.set(kinds)
    try:
        yield
    finally:
        _active.reset(token)
        with _lock:
            _open -= 1
            if _open == 0:
                Conv.components["CONV"] = _original


def _is_pointwise(kernel_size: int | Sequence[int]) -> bool:
    lengths = [kernel_size] if isinstance(kernel_size, int) else list(kernel_size)
    return len(lengths) > 0 and all(length == 1 for length in lengths)


# --- afterwards ---


@dataclass(frozen=True)
class KANReplacement:
    """What `to_kan` did with one module.

    Args:
        name: dotted name in the network, the first one where it has several; empty for the network itself.
        kind: name of the class it had.
        replaced: whether a KAN layer is there now.
        reason: why not; empty where it was replaced.
        error: largest difference between the KAN layer's functions and what they imitate, on the grid, for a weight
            of 1; 0 where nothing was imitated.
    """

    name: str
    kind: str
    replaced: bool
    reason: str = ""
    error: float = 0.0


@dataclass(frozen=True)
class _Plan:
    """Settings of one conversion, and the functions that its layers start from."""

    kinds: tuple[type[nn.Module], ...]
    basis: Basis
    base_activation: str | None
    imitate: bool
    line: Tensor  # (K,) coefficients of the straight line t
    line_error: float

    def replace(self, old: Any, like: Tensor | None) -> tuple[nn.Module, float]:
        """Return the KAN layer for ``old`` and the error of its functions.

        ``like`` is the parameter whose dtype and device an activation without parameters works on.
        """
        if isinstance(old, _ACTIVATIONS):
            return self._activation(old, like)
        new = self._layer(old)
        with torch.no_grad():
            if not self.imitate:
                new.reset_parameters()
            else:
                line = self.line.to(old.weight)
                new.coefficients.copy_(line.view(-1, *[1] * (old.weight.dim() - 1)) * old.weight[:, None])
                if new.base_weight is not None:
                    new.base_weight.zero_()
                if new.bias is not None:
                    new.bias.copy_(old.bias)
        new.weight.requires_grad_(old.weight.requires_grad)
        if new.bias is not None:
            new.bias.requires_grad_(old.bias.requires_grad)
        return new.train(old.training), self.line_error if self.imitate else 0.0

    def _layer(self, old: Any) -> Any:
        """Return a KAN layer of the shape, dtype and device of ``old``, with weights not set; draw nothing."""
        words: dict[str, Any] = {"basis": self.basis, "base_activation": self.base_activation}
        words |= {"bias": old.bias is not None, "dtype": old.weight.dtype, "device": "meta"}
        if isinstance(old, nn.Linear):
            new: nn.Module = KANLinear(old.in_features, old.out_features, **words)
        else:
            names = ("stride", "padding", "dilation", "groups", "padding_mode")
            words |= {name: getattr(old, name) for name in names}
            new = _CONVOLUTIONS[type(old)](old.in_channels, old.out_channels, old.kernel_size, **words)
        for name, parameter in list(new.named_parameters(recurse=False)):
            setattr(new, name, nn.Parameter(torch.empty_like(parameter, device=old.weight.device)))
        return new.to(old.weight.device)

    def _activation(self, old: nn.Module, like: Tensor | None) -> tuple[nn.Module, float]:
        """Return the KAN activation for ``old``: as it starts by itself, or fitted with or without the base term."""
        number = old.num_parameters if isinstance(old, nn.PReLU) else 1
        with torch.random.fork_rng(devices=[]):
            new = KANActivation(number, basis=self.basis, base_activation=self.base_activation)
        functions, error = new.functions, 0.0
        if self.imitate:
            same = copy.deepcopy(old).to("cpu", torch.float64)
            low, high = self.basis.grid_range
            t = torch.linspace(low, high, 401, dtype=torch.float64)
            with torch.no_grad():
                wanted = same(t[:, None].repeat(1, number))  # (P, number)
                starts = []
                for base in (0.0, 1.0) if functions.base_weight is not None else (0.0,):
                    coefficients, worst = _fit(self.basis, t, wanted - base * F.silu(t)[:, None])
                    starts.append((worst, base, coefficients))
                error, base, coefficients = min(starts, key=lambda start: start[0])
                functions.coefficients.copy_(coefficients.t()[:, :, None, None])
                if functions.base_weight is not None:
                    functions.base_weight.fill_(base)
        parameter = next(old.parameters(), None)
        if parameter is not None:
            new = new.to(parameter).requires_grad_(parameter.requires_grad)
        elif like is not None:
            new = new.to(like)
        return new.train(old.training), error


def _fit(basis: Basis, t: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """Return the coefficients ``(K, *)`` for which the functions are nearest to ``targets`` ``(P, *)``, and how near.

    A weak ridge is exact where the targets are in the span. A stronger one keeps the coefficients of overlapping
    functions small, whose sum would otherwise cancel: what float32 rounds off counts as distance.
    """
    values = basis.values(t, dim=1)  # (P, K)
    fits = []
    for ridge in (1e-6, 1e-10, 1e-14):
        coefficients = basis.fit(t, targets, ridge=ridge)
        error = float((torch.tensordot(values, coefficients, dims=1) - targets).abs().max())
        rounding = torch.finfo(torch.float32).eps * float(coefficients.abs().max())
        fits.append((error + rounding, coefficients, error))
    return min(fits, key=lambda fit: fit[0])[1:]


def to_kan(
    network: nn.Module,
    *,
    convolutions: bool = True,
    linears: bool = False,
    activations: bool = False,
    initialization: str = "imitate",
    skip: Skip = (),
    skip_pointwise: bool = False,
    in_place: bool = False,
    record: list[KANReplacement] | None = None,
    basis: BasisSpec = "bspline",
    grid_size: int = 5,
    spline_order: int = 3,
    grid_range: tuple[float, float] = (-3.0, 3.0),
    outside: str | None = None,
    base_activation: str | None = "silu",
) -> nn.Module:
    r"""Turn the convolutions of any network, its linear layers or its activations, into KAN layers.

    With ``initialization="imitate"`` the KAN layer starts as the layer that it replaces, so that a trained network
    keeps what it has learned: a weight :math:`w` becomes the function :math:`w t`, which B-splines and Chebyshev
    polynomials represent exactly, and with ``outside="linear"`` everywhere; the base term starts at 0. Other bases
    start at the nearest fit, with a warning if that is far. Activations start at the nearest fit too.

    Modules, not calls of functions, are replaced, and only those whose class is exactly ``nn.Conv1d``, ``nn.Conv2d``,
    ``nn.Conv3d``, ``nn.Linear`` or a common activation of one variable: a subclass may compute something else. A module
    that stands in several places stays one. Left as they are, with the reason in ``record``: layers with
    parametrizations or hooks, layers that share a parameter with another module or are held in a plain list too, and
    linear layers whose weights are read by PyTorch's transformer layers. Mode, device, dtype and ``requires_grad`` are
    kept. Make optimizers afterwards.

    Args:
        network: any module.
        convolutions: whether to replace convolutions; transposed ones never are.
        linears: whether to replace linear layers.
        activations: whether to replace activations, each by one `KANActivation`.
        initialization: ``"imitate"``, or ``"variance"`` to draw new weights that keep the variance.
        skip: what to leave as it is: names or patterns of names such as ``"model.0.*"`` (what lies inside goes with
            it), classes (likewise), or a function of name and module that is true for those to leave.
        skip_pointwise: whether convolutions with a kernel of one element stay ordinary ones.
        in_place: whether to change ``network`` itself, not a copy.
        record: list to which one `KANReplacement` for each module that was looked at is added.
        basis: the functions: a name, a pair ``(name, settings)``, or a `Basis`.
        grid_size: number of intervals of the grid, for a basis given by name.
        spline_order: order of its splines.
        grid_range: first and last knot, in the unit of a layer's inputs.
        outside: how the functions go on outside of the grid. ``None``: by the tangent where layers imitate and the
            basis can do it, otherwise the basis's own default.
        base_activation: ``"silu"``, or ``None`` to leave the base term out.

    Returns:
        The network with KAN layers: a copy, unless ``in_place``.

    Raises:
        ValueError: if a setting is out of its range, if a name in ``skip`` is not in the network, or if nothing was
            replaced.
        TypeError: if an argument is of the wrong kind.

    Example:
        >>> from monai.networks.nets import UNet
        >>> unet = UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,)).eval()
        >>> image = torch.randn(1, 1, 16, 16)
        >>> torch.allclose(to_kan(unet)(image), unet(image), atol=1e-5)
        True
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"`network` must be a torch.nn.Module; got {type(network).__name__}.")
    plan = _plan(
        (convolutions, linears, activations),
        initialization,
        basis,
        (grid_size, spline_order, grid_range, outside),
        base_activation,
    )
    must_skip = _skip_rule(network, skip)
    network = network if in_place else copy.deepcopy(network)
    found: list[KANReplacement] = []
    new: dict[nn.Module, nn.Module] = {}
    reasons = _Reasons(network)
    like = next((parameter for parameter in network.parameters() if parameter.is_floating_point()), None)
    for name, module in network.named_modules():
        # The last module with parameters is what most likely comes before an activation without any.
        own = module.parameters(recurse=False)
        like = next((parameter for parameter in own if parameter.is_floating_point()), like)
        if not isinstance(module, plan.kinds):
            continue
        reason = "skipped as asked" if must_skip(name, module) else reasons.find(module)
        if not reason and skip_pointwise and _is_pointwise(getattr(module, "kernel_size", ())):
            reason = "its kernel has one element"
        if not reason and in_place and module is network:
            reason = "it is the network itself, which cannot be replaced in place"
        error = 0.0
        if not reason:
            new[module], error = plan.replace(module, like)
        found.append(KANReplacement(name, type(module).__name__, not reason, reason, error))
    if not new:
        raise ValueError(f"Nothing in {type(network).__name__} was replaced by KAN layers: {_explain(found)}.")
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    _logger.info("to_kan: %d modules of %s replaced; %s.", len(new), type(network).__name__, _explain(found))
    if record is not None:
        record.extend(found)
    return new.get(network, network)


def _plan(
    wanted: tuple[bool, bool, bool],
    initialization: str,
    basis: BasisSpec,
    grid: tuple[int, int, tuple[float, float], str | None],
    base_activation: str | None,
) -> _Plan:
    imitate = check_choice("initialization", initialization, ("imitate", "variance")) == "imitate"
    check_choice("base_activation", base_activation, ("silu", None))
    groups: list[tuple[type[nn.Module], ...]] = [tuple(_CONVOLUTIONS), (nn.Linear,), _ACTIVATIONS]
    kinds = tuple(kind for group, use in zip(groups, wanted, strict=True) for kind in group if use)
    if not kinds:
        raise ValueError("One of `convolutions`, `linears` and `activations` must be true; got none.")
    grid_size, spline_order, grid_range, outside = grid
    if imitate and outside is None:
        if isinstance(basis, str) and _can_go_on(basis):
            outside = "linear"
        elif isinstance(basis, tuple) and _can_go_on(basis[0]):
            basis = basis[0], {"outside": "linear", **basis[1]}
    built = build_basis(basis, grid_size, spline_order, grid_range, outside)
    t = torch.linspace(*built.grid_range, 401, dtype=torch.float64)
    line, error = _fit(built, t, t)
    if imitate and any(wanted[:2]) and error > 1e-3 * float(t.abs().max()):
        warnings.warn(
            f"{built} cannot represent a straight line: layers start {error:.2g} off on its grid, for a weight of 1. "
            "Take basis='bspline' to start from the network as it is.",
            stacklevel=3,
        )
    return _Plan(kinds, built, base_activation, imitate, line, error)


def _can_go_on(name: str) -> bool:
    return "outside" in inspect.signature(BASES.get(name)).parameters


def _skip_rule(network: nn.Module, skip: Skip) -> Callable[[str, nn.Module], bool]:
    """Return the function that says which modules are to be left; names of its copy are those of ``network``."""
    if callable(skip) and not isinstance(skip, type):
        return skip
    items = [skip] if isinstance(skip, (str, type)) else list(skip)
    names = [name for name, _ in network.named_modules(remove_duplicate=False)]
    left: set[str] = set()
    for item in items:
        if isinstance(item, str):
            matches = [name for name in names if fnmatch.fnmatchcase(name, item)]
            if not matches:
                raise ValueError(f"`skip` names '{item}', which no module is called.{did_you_mean(item, names)}")
        elif isinstance(item, type):
            modules = network.named_modules(remove_duplicate=False)
            matches = [name for name, module in modules if isinstance(module, item)]
        else:
            raise TypeError(f"`skip` must hold names and classes, or be a function; got {item!r}.")
        left.update(matches)
    inside = {name for name in names if any(name == top or not top or name.startswith(f"{top}.") for top in left)}
    modules = {id(module) for name, module in network.named_modules(remove_duplicate=False) if name in inside}
    first = {name for name, module in network.named_modules() if id(module) in modules}
    return lambda name, module: name in first


class _Reasons:
    """Why modules of a network cannot be replaced."""

    def __init__(self, network: nn.Module) -> None:
        self.in_transformer: set[nn.Module] = set()
        self.in_lists: set[nn.Module] = set()
        owners: dict[Tensor, set[nn.Module]] = {}
        for module in network.modules():
            if isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
                self.in_transformer.update(module.children())
            for parameter in module.parameters(recurse=False):
                owners.setdefault(parameter, set()).add(module)
            for name, value in vars(module).items():
                if not name.startswith("_") and isinstance(value, (list, tuple)):
                    self.in_lists.update(item for item in value if isinstance(item, nn.Module))
        self.sharing = {module for modules in owners.values() if len(modules) > 1 for module in modules}

    def find(self, module: nn.Module) -> str:
        """Return why ``module`` cannot be replaced; an empty text if it can."""
        exact = type(module) in _CONVOLUTIONS or type(module) is nn.Linear or type(module) in _ACTIVATIONS
        weight = getattr(module, "weight", None)
        if is_parametrized(module):
            return "it has parametrizations; remove them first"
        if not exact:
            return "its class is derived from one that could be replaced, and may compute something else"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return "it has hooks"
        if module in self.sharing:
            return "it shares a parameter with another module"
        if module in self.in_transformer:
            return "PyTorch's transformer layers read its weights"
        if module in self.in_lists:
            return "it is held in a plain list too"
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            return f"its weights are {weight.dtype}"
        return ""


def _explain(found: list[KANReplacement]) -> str:
    """Say in a few words what was left and why."""
    if not found:
        return "it holds no modules of the wanted kinds"
    reasons: dict[str, list[str]] = {}
    for one in found:
        if not one.replaced:
            reasons.setdefault(one.reason, []).append(one.name or "the network itself")
    parts = [f"{len(names)} left because {why} ({', '.join(names[:3])})" for why, names in reasons.items()]
    return "; ".join(parts) or "none left"
