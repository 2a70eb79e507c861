"""Layers put together for reuse."""
