"""How gradients get through a solve."""
