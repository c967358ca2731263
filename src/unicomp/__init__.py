"""Compress Hugging Face checkpoints, and prove what was lost."""

__version__ = "0.1.0"
