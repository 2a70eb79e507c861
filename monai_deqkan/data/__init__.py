"""Data sets: samples, folders, fastMRI files."""
