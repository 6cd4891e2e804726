"""mdiff: train diffusion models, measure what they memorized, find where it sits, repair it."""

__version__ = "0.5.0"
