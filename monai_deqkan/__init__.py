"""Kolmogorov-Arnold networks, deep equilibrium models and equilibrium MRI reconstruction for MONAI.

Importing the package is its registration: afterwards MONAI's bundle configurations find its classes by short name
(``"_target_": "KANUNet"`` with ``"imports": ["$import monai_deqkan"]``), ``act: kan`` works in every MONAI network
that takes an activation, likewise ``norm: nonexpansive_group``, and ``Conv["kan", 2]`` is `KANConv2d`. Not for clinical
use.
"""

from monai.networks.layers.factories import Act, Conv, Norm

from monai_deqkan import (
    adjoints,
    data,
    engines,
    handlers,
    losses,
    metrics,
    networks,
    operators,
    solvers,
    transforms,
    variational,
    visualize,
)
from monai_deqkan.networks.layers import KANActivation, NonexpansiveGroupNorm
from monai_deqkan.networks.layers.kan_conv import KAN_CONVOLUTIONS

__all__ = [
    "__version__",
    "adjoints",
    "data",
    "engines",
    "handlers",
    "losses",
    "metrics",
    "networks",
    "operators",
    "solvers",
    "transforms",
    "variational",
    "visualize",
]

__version__ = "0.1.0"

if "KAN" not in Act.names:
    Act.add_factory_class("kan", KANActivation)
if "NONEXPANSIVE_GROUP" not in Norm.names:
    Norm.add_factory_class("nonexpansive_group", NonexpansiveGroupNorm)
if "KAN" not in Conv.names:
    Conv.add_factory_callable("kan", KAN_CONVOLUTIONS.__getitem__, "KAN convolution layers")
