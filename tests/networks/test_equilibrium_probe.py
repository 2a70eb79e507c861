import math

import pytest
import torch

from monai_deqkan.networks import EquilibriumProbe
from monai_deqkan.networks.blocks import KANCell
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.networks.nets import DEQReconstructor
from monai_deqkan.operators import equispaced_mask, simulate_kspace, smooth_coil_maps
from monai_deqkan.solvers import AndersonSolver, FixedPointIteration, open_recorders, solve_budget


class Linear(torch.nn.Module):
    """``z -> a z + x``, with the equilibrium ``x / (1 - a)``."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, z, x):
        return self.slope * z + x


def test_estimate_of_a_linear_map_is_exact():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    layer = DEQLayer(Linear(0.8), FixedPointIteration(rtol=1e-2, max_iter=200))
    with torch.no_grad(), EquilibriumProbe(layer) as probe:
        z = layer(x)
    error = probe.errors(estimate=True)
    truth = (z - 5 * x).norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(error.estimated_error, truth)
    # Nothing is certified: no bound.
    assert error.certified_factor == math.inf
    assert error.error_bound.tolist() == [math.inf, math.inf]
    assert probe.errors().estimated_error.isnan().all()


def test_bound_is_residual_over_one_minus_the_factor_and_holds():
    torch.manual_seed(0)
    cell = KANCell(6, contraction=0.9).double()
    layer = DEQLayer(cell, FixedPointIteration(rtol=1e-3, max_iter=500))
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad(), EquilibriumProbe(layer) as probe:
        z = layer(x)
    with torch.no_grad(), solve_budget(rtol=1e-13):
        exact = layer(x)
        residual = (cell(z, x) - z).norm(dim=1) / cell(z, x).norm(dim=1)
    error = probe.errors()
    assert error.certified_factor == pytest.approx(cell.certified_contraction().factor)
    torch.testing.assert_close(error.error_bound, residual / (1 - error.certified_factor))
    assert ((z - exact).norm(dim=1) / exact.norm(dim=1) <= error.error_bound * 1.001).all()


@pytest.mark.parametrize("form", ["contracting", "cg", "prox", "grad"])
def test_estimate_of_a_reconstruction_is_near_the_distance_to_the_exact_one(form):
    torch.manual_seed(0)
    settings = {"num_layers": 2, "features": 4, "num_cg_steps": 2}
    network = DEQReconstructor(2, form=form, **settings, solver=AndersonSolver(rtol=1e-3, max_iter=300)).double()
    generator = torch.Generator().manual_seed(1)
    maps = smooth_coil_maps((24, 20), 4, generator=generator).to(torch.complex128)
    mask = equispaced_mask(20, 2, 0.3, generator=generator).view(1, 1, 1, -1)
    image = torch.zeros(1, 24, 20, dtype=torch.complex128)
    image[:, 6:18, 5:15] = 1
    kspace = simulate_kspace(image, maps) * mask
    with torch.no_grad():
        with EquilibriumProbe(network) as probe:
            found = network(kspace, mask, maps[None])
        error = probe.errors(estimate=True)
        with solve_budget(rtol=1e-9, max_iter=2000):
            exact = network(kspace, mask, maps[None])
    distance = float((found - exact).norm() / exact.norm())
    assert 0.8 * distance <= float(error.estimated_error) <= 1.5 * distance
    assert (float(error.error_bound) < math.inf) == (form == "contracting")
    assert distance <= float(error.error_bound)


def test_no_smaller_residual_means_an_infinite_estimate():
    layer = DEQLayer(Linear(1.5), FixedPointIteration(rtol=1e-3, max_iter=3, on_failure="ignore"))
    with torch.no_grad(), EquilibriumProbe(layer) as probe:
        layer(torch.ones(1, 2))
    assert probe.errors(estimate=True).estimated_error.tolist() == [math.inf]


def test_an_equilibrium_met_exactly_has_no_error():
    layer = DEQLayer(Linear(0.0), FixedPointIteration(rtol=1e-3))
    with torch.no_grad(), EquilibriumProbe(layer) as probe:
        layer(torch.ones(1, 2), torch.ones(1, 2))
    assert probe.errors(estimate=True).estimated_error.tolist() == [0.0]


def test_several_equilibria_or_none_have_no_error():
    layer = DEQLayer(Linear(0.5))
    with torch.no_grad(), EquilibriumProbe(layer) as probe:
        assert probe.errors() is None
        layer(torch.ones(1, 2))
        layer(torch.ones(1, 2))
    assert probe.errors() is None


def test_nothing_is_left_behind_after_an_exception():
    class Broken(torch.nn.Module):
        def forward(self, z, x):
            raise RuntimeError("broken")

    layer = DEQLayer(Broken())
    with pytest.raises(RuntimeError, match="broken"), EquilibriumProbe(layer):
        layer(torch.ones(1, 2))
    assert open_recorders() == ()
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
