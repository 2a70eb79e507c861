"""Layers without knowledge of the task."""

from monai_deqkan.networks.layers.basis import BASES, Basis
from monai_deqkan.networks.layers.bspline import BSplineBasis
from monai_deqkan.networks.layers.deq import DEQLayer
from monai_deqkan.networks.layers.harmonic_basis import ChebyshevBasis, FourierBasis
from monai_deqkan.networks.layers.kan_activation import KANActivation
from monai_deqkan.networks.layers.kan_compare import OutputChanges, compare_outputs
from monai_deqkan.networks.layers.kan_conv import KANConv1d, KANConv2d, KANConv3d
from monai_deqkan.networks.layers.kan_extension import (
    GridExtension,
    extend_grid,
    extend_grids,
    reset_optimizer_state,
)
from monai_deqkan.networks.layers.kan_grid import GridRefit, refit_grid, refit_grids
from monai_deqkan.networks.layers.kan_importance import (
    KANEdge,
    edge_importance,
    edge_values,
    input_sensitivity,
    rank_edges,
)
from monai_deqkan.networks.layers.kan_inputs import InputStatistics, LayerInputs, record_kan_inputs
from monai_deqkan.networks.layers.kan_layer import KANLayer
from monai_deqkan.networks.layers.kan_linear import KANLinear
from monai_deqkan.networks.layers.kan_low_rank import LowRankKANConv1d, LowRankKANConv2d, LowRankKANConv3d
from monai_deqkan.networks.layers.kan_norm import kan_lipschitz_bound
from monai_deqkan.networks.layers.kan_prune import (
    KANMask,
    PruningRecord,
    PruningReport,
    make_pruning_permanent,
    prune_basis,
    prune_edges,
)
from monai_deqkan.networks.layers.kan_quantize import KANDequantizer, dequantize_kan, quantize_kan
from monai_deqkan.networks.layers.kan_remove import ChannelSubset, remove_pruned_channels
from monai_deqkan.networks.layers.kan_shape import ShapeConstraint, constrain_shape
from monai_deqkan.networks.layers.kan_symbolic import SymbolicFit, suggest_edge_symbolic, suggest_symbolic
from monai_deqkan.networks.layers.kan_tabulate import EdgeTables, TabulatedBasis, edge_tables, tabulate_kan
from monai_deqkan.networks.layers.lipschitz import (
    CertifiedSpectralNorm,
    certified_spectral_norm,
    frozen_weights,
    normalize_lipschitz_,
    remove_spectral_norm,
)
from monai_deqkan.networks.layers.nonexpansive_norm import NonexpansiveGroupNorm
from monai_deqkan.networks.layers.operator_norm import conv_norm_bound, linear_norm_bound
from monai_deqkan.networks.layers.radial_basis import GaussianBasis, MexicanHatBasis

__all__ = [
    "BASES",
    "BSplineBasis",
    "Basis",
    "CertifiedSpectralNorm",
    "ChannelSubset",
    "ChebyshevBasis",
    "DEQLayer",
    "EdgeTables",
    "FourierBasis",
    "GaussianBasis",
    "GridExtension",
    "GridRefit",
    "InputStatistics",
    "KANActivation",
    "KANConv1d",
    "KANConv2d",
    "KANConv3d",
    "KANDequantizer",
    "KANEdge",
    "KANLayer",
    "KANLinear",
    "KANMask",
    "LayerInputs",
    "LowRankKANConv1d",
    "LowRankKANConv2d",
    "LowRankKANConv3d",
    "MexicanHatBasis",
    "NonexpansiveGroupNorm",
    "OutputChanges",
    "PruningRecord",
    "PruningReport",
    "ShapeConstraint",
    "SymbolicFit",
    "TabulatedBasis",
    "certified_spectral_norm",
    "compare_outputs",
    "constrain_shape",
    "conv_norm_bound",
    "dequantize_kan",
    "edge_importance",
    "edge_tables",
    "edge_values",
    "extend_grid",
    "extend_grids",
    "frozen_weights",
    "input_sensitivity",
    "kan_lipschitz_bound",
    "linear_norm_bound",
    "make_pruning_permanent",
    "normalize_lipschitz_",
    "prune_basis",
    "prune_edges",
    "quantize_kan",
    "rank_edges",
    "record_kan_inputs",
    "refit_grid",
    "refit_grids",
    "remove_pruned_channels",
    "remove_spectral_norm",
    "reset_optimizer_state",
    "suggest_edge_symbolic",
    "suggest_symbolic",
    "tabulate_kan",
]
