"""Ignite handlers."""
