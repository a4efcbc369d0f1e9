"""Fine-tuning of an image classifier, on one machine or a Ray cluster."""

__version__ = "0.1.0"
