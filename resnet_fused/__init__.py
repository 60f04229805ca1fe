"""Fused residual networks for PyTorch."""

from .backends import use

__version__ = "0.1.0"
__all__ = ["use"]
