"""The demonstration: all three bundles on sample data, and a report."""

from monai_deqkan.demo.run import TASKS, run_demo

__all__ = ["TASKS", "run_demo"]
