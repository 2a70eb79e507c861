"""Parts of MONAI's trainers and evaluators."""
