"""Reading images of any common format."""
