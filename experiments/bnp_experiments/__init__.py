"""Experiments with BNP: data, models, methods, training, figures and the command line."""

__version__ = "0.1.0"
