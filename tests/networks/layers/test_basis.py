from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_deqkan.networks.layers import (
    BASES,
    Basis,
    BSplineBasis,
    ChebyshevBasis,
    FourierBasis,
    GaussianBasis,
    KANLinear,
    MexicanHatBasis,
)
from monai_deqkan.networks.layers.basis import build_basis
from monai_deqkan.testing import check_basis

KINDS = [
    BSplineBasis(7, 1, outside="linear"),
    BSplineBasis(3, 2, (0.0, 1.0), outside="clamp"),
    BSplineBasis(),
    BSplineBasis(outside="clamp"),
    BSplineBasis(4, 4, outside="linear"),
    BSplineBasis(4, 5),
    GaussianBasis(),
    GaussianBasis(8, (-1.0, 2.0), width=None, outside="linear"),
    MexicanHatBasis(),
    MexicanHatBasis(outside="clamp"),
    ChebyshevBasis(),
    ChebyshevBasis(4, (-1.0, 2.0), outside="linear"),
    FourierBasis(),
]


@pytest.mark.parametrize("basis", KINDS, ids=repr)
def test_keeps_to_the_rules(basis: Basis) -> None:
    check_basis(basis)


@pytest.mark.parametrize("basis", KINDS, ids=repr)
def test_is_differentiable_twice(basis: Basis) -> None:
    # away from the kinks of hats and clamped functions, and in the center of a spline
    x = torch.tensor([-4.3, -1.11, -0.2, 0.07, 0.55, 1.9, 5.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(basis.values, x)
    if not (isinstance(basis, BSplineBasis) and basis.spline_order == 1):  # their second derivative is zero
        assert torch.autograd.gradgradcheck(basis.values, x)
    slope = basis.derivative(x)
    for k in range(basis.num_basis):
        (found,) = torch.autograd.grad(basis.values(x)[k].sum(), x)
        torch.testing.assert_close(found, slope[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("basis", KINDS, ids=repr)
@pytest.mark.filterwarnings("ignore")  # torch's own, on scripting and on export
def test_scripts_exports_and_compiles(basis: Basis) -> None:
    torch.compiler.reset()  # one function for many bases, which has a limit of compilations
    x = 3 * torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    values = basis.values(x, dim=1)
    module = basis.module()
    assert not list(module.parameters())
    scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(x), values)
    torch.testing.assert_close(scripted(x.half()), basis.values(x.half(), dim=1))
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(x[:2]), values[:2])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    compiled(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, (2 * values * basis.derivative(x, dim=1)).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_different_bases_are_scripted_in_one_network() -> None:
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GaussianBasis().module(), ChebyshevBasis(5).module()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) - self.second(x)

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = GaussianBasis().values(x, 1) - ChebyshevBasis(5).values(x, 1)
    torch.testing.assert_close(torch.jit.script(Pair())(x), expected)


@pytest.mark.parametrize("basis", KINDS, ids=repr)
def test_stays_finite_far_outside(basis: Basis) -> None:
    for x in (torch.tensor([[1e30, -1e30]]), torch.tensor([[1e4, -1e4, 6e4]], dtype=torch.float16)):
        out = torch.empty(1, basis.num_basis, x.shape[1], dtype=x.dtype)
        basis.fill(x, out)
        for found in (basis.values(x), basis.derivative(x), out, basis.pull_back(x, torch.ones_like(out))):
            assert found.isfinite().all()


@pytest.mark.parametrize("basis", KINDS, ids=repr)
def test_fit_solves_the_ridge_problem(basis: Basis) -> None:
    generator = torch.Generator().manual_seed(0)
    t = 4 * torch.randn(60, generator=generator, dtype=torch.float64)
    y = torch.randn(60, 2, 3, generator=generator, dtype=torch.float64)
    w = torch.rand(60, generator=generator, dtype=torch.float64)
    ridge = 0.01
    matrix = (basis.values(t, dim=1) * w.sqrt()[:, None]).numpy()
    damping = np.sqrt(ridge * (matrix**2).sum() / basis.num_basis) * np.eye(basis.num_basis)
    right = (y.reshape(60, 6) * w.sqrt()[:, None]).numpy()
    exact, *_ = np.linalg.lstsq(np.vstack((matrix, damping)), np.vstack((right, 0 * damping[:, :1] * right[:1])))
    found = basis.fit(t, y, w, ridge=ridge)
    np.testing.assert_allclose(found.reshape(-1, 6).numpy(), exact, rtol=0, atol=1e-10)


def test_fit_is_finite_on_hostile_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        basis = KINDS[trial % len(KINDS)]
        t = torch.randn(1 + trial % 40, generator=generator) * 10.0 ** (trial % 7)
        t = t[:1].expand(9) if trial % 3 == 0 else t
        y = torch.randn(len(t), generator=generator) * 10.0 ** (trial % 60 - 30)
        for ridge in (0.0, 1e-12, 1e-6):
            assert basis.fit(t, y, ridge=ridge).isfinite().all(), (basis, trial)
    with pytest.raises(ValueError, match="`targets` must be finite; 1 of 3"):
        BSplineBasis().fit(torch.zeros(3), torch.tensor([0.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="`weights` must not be negative; the smallest is -1"):
        BSplineBasis().fit(torch.zeros(2), torch.zeros(2), -torch.ones(2))
    with pytest.raises(ValueError, match="`targets` must have shape"):
        BSplineBasis().fit(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="`ridge`"):
        BSplineBasis().fit(torch.zeros(2), torch.zeros(2), ridge=-1.0)


@dataclass(frozen=True)
class Powers(Basis):
    """1, x, x^2: a third party's basis, by the required methods only."""

    num_basis: int = field(default=3)

    def values(self, x: Tensor, dim: int = 0) -> Tensor:
        return torch.stack([x.float().pow(k).to(x.dtype) if x.dtype.itemsize < 4 else x.pow(k) for k in range(3)], dim)

    def derivative(self, x: Tensor, dim: int = 0) -> Tensor:
        return torch.stack([torch.zeros_like(x), torch.ones_like(x), 2 * x], dim)


def test_a_foreign_basis_works_in_a_layer() -> None:
    layer = KANLinear(2, 1, basis=Powers(), base_activation=None, dtype=torch.float64)
    with torch.no_grad():
        layer.coefficients.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])[None])
    x = torch.tensor([[2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.item() == (1 + 3 * 2 + 5 * 4) + (2 - 4 + 6)
    y.backward()
    torch.testing.assert_close(x.grad, torch.tensor([[3.0 + 10 * 2, 4.0 - 12]], dtype=torch.float64))


@dataclass(frozen=True)
class Wrong(BSplineBasis):
    def derivative(self, x: Tensor, dim: int = 0) -> Tensor:
        return 1.01 * super().derivative(x, dim)


def test_a_foreign_basis_has_defaults() -> None:
    basis = Powers()
    assert basis.grid_range == (-1.0, 1.0)
    # x^2 is steeper the further out
    assert basis.lipschitz_constants()[0] == 0.0
    assert basis.lipschitz_constants()[1] == 1.0
    assert basis.lipschitz_constants()[2] == math.inf
    assert basis.slope_gain == math.inf
    t = torch.linspace(-1.0, 1.0, 50)
    found = basis.fit(t, 1 - 2 * t + 3 * t**2)
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), rtol=1e-4, atol=0)
    for change in (basis.resized, basis.refined):
        with pytest.raises(TypeError, match="The number of functions of Powers"):
            change(2)


def test_check_basis_finds_what_is_wrong() -> None:
    with pytest.raises(AssertionError, match="`derivative` is the slope of `values`"):
        check_basis(Wrong())

    class Local(BSplineBasis):
        pass

    with pytest.raises(AssertionError, match="pickled"):
        check_basis(Local())


def test_registry_and_layer_arguments() -> None:
    assert BASES.build("bspline", grid_size=3) == BSplineBasis(3)
    for name, kind in [
        ("bspline", BSplineBasis),
        ("gaussian", GaussianBasis),
        ("mexican_hat", MexicanHatBasis),
        ("chebyshev", ChebyshevBasis),
        ("fourier", FourierBasis),
    ]:
        assert build_basis(name, 5, 3, (-3.0, 3.0), None) == kind()
        assert build_basis(name, grid_range=(-1.0, 2.0)) == kind(grid_range=(-1.0, 2.0))
    assert build_basis("bspline", 7, 2, (-1.0, 1.0), "linear") == BSplineBasis(7, 2, (-1.0, 1.0), "linear")
    assert build_basis("gaussian", grid_size=7, outside="clamp") == GaussianBasis(7, outside="clamp")
    assert build_basis(("bspline", {"grid_size": 9})) == BSplineBasis(9)
    with pytest.raises(TypeError, match="`grid_size` of a layer only apply"):
        build_basis(("bspline", {}), 9)
    with pytest.raises(TypeError, match="'fourier' has no `grid_size`, `outside`; its settings are `num_frequencies`"):
        build_basis("fourier", grid_size=9, outside="clamp")
    with pytest.raises(ValueError, match="bspline"):
        build_basis("bsplin")
    with pytest.raises(ValueError, match="`outside` must be one of clamp, linear"):
        build_basis("chebyshev", outside="zero")
    assert BSplineBasis(grid_range=[-1, 1]) == BSplineBasis(grid_range=(-1.0, 1.0))  # type: ignore[arg-type]  # JSON
    assert BSplineBasis(4, 3, (-1.0, 1.0)).step == 0.5


def test_a_misspelt_setting_is_named() -> None:
    with pytest.raises(TypeError, match=r"The basis 'bspline' has no `gridsize`; .* Did you mean 'grid_size'\?"):
        build_basis(("bspline", {"gridsize": 3}))
