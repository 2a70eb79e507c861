from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from monai_deqkan.networks.layers import BSplineBasis, GaussianBasis, KANConv2d, KANConv3d, LowRankKANConv2d


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("segmentation_cost")
    finally:
        sys.path.remove(folder)


def test_the_products_of_a_basis_are_those_of_its_formula(cost: ModuleType) -> None:
    # (p p p - 4 q q q) / 6 has two products each, the factor 4 and the division; one division by the step is shared.
    assert cost.basis_multiply_adds(BSplineBasis()) == 8 * 6 + 1
    assert cost.basis_multiply_adds(BSplineBasis(grid_size=3, spline_order=2)) == 5 * 4 + 1
    assert cost.basis_multiply_adds(GaussianBasis()) > 8


def test_plain_convolutions_count_as_their_formula(cost: ModuleType) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2))
    assert cost.multiply_adds(network, (2, 3, 8, 6)) == 2 * 48 * (9 * 3 * 4 + 4 * 4 * 2)


def test_kan_convolutions_count_their_maps_and_their_basis(cost: ModuleType) -> None:
    layer = KANConv2d(3, 4, 3, stride=2, padding=1, base_activation=None)
    assert cost.multiply_adds(layer, (1, 3, 8, 8)) == 16 * 9 * (8 * 3) * 4 + 3 * 64 * 49
    layer = KANConv3d(2, 3, 1)
    assert cost.multiply_adds(layer, (1, 2, 4, 4, 4)) == 64 * (9 * 2) * 3 + 2 * 64 * (49 + 2)
    layer = LowRankKANConv2d(3, 4, 3, rank=5, base_activation=None)
    chain = 100 * 24 * 5 + 80 * 3 * 5 + 64 * 3 * 5 + 64 * 5 * 4
    assert cost.multiply_adds(layer, (1, 3, 10, 10)) == chain + 300 * 49


def test_peak_and_time_are_of_the_step_given(cost: ModuleType) -> None:
    kept: list[Tensor] = []
    assert cost.peak_mib(lambda: kept.append(torch.empty(3 * 2**18))) == pytest.approx(3.0, abs=0.1)
    network = nn.Conv2d(1, 1, 1).train()
    assert 0 < cost.inference_ms(network, (2, 1, 8, 8), repeats=3) < 1000
    assert network.training
