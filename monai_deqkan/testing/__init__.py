"""Conformance checks that any plug-in can run."""
