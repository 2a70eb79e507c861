"""Whole networks with MONAI's constructor words."""
