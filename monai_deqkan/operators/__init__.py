"""Linear forward models of MRI."""
