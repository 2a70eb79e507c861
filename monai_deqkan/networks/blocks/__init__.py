"""Layers put together for reuse."""

from monai_deqkan.networks.blocks.kan_block import KANBlock

__all__ = ["KANBlock"]
