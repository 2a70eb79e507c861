"""Kolmogorov-Arnold networks, deep equilibrium models and equilibrium MRI reconstruction for MONAI."""

__version__ = "0.1.0"
