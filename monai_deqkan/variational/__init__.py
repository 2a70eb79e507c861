"""Reconstruction without learning: the start of an equilibrium, and its rivals."""

from monai_deqkan.variational.cg_sense import cg_sense, cg_sense_path

__all__ = ["cg_sense", "cg_sense_path"]
