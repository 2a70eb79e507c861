"""Metrics that MONAI lacks."""
