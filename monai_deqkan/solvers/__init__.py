"""Find z with z = f(z), or x with A x = b."""
