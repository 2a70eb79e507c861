"""Layers, blocks and whole networks."""

from monai_deqkan.networks import blocks, layers, nets

__all__ = ["blocks", "layers", "nets"]
