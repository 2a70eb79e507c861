"""Transforms of k-space."""
