"""Transforms in MONAI's array and dictionary forms."""
