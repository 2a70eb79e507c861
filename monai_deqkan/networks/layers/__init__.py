"""Layers without knowledge of the task."""
