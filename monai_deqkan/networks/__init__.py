"""Layers, blocks and whole networks."""
