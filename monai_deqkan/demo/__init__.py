"""The demonstration: all three bundles on sample data."""
