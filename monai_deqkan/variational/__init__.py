"""Reconstruction without learning: the start of an equilibrium, and its rivals."""
