"""Blocks: chains of steps as autograd nodes and as modules."""

from .chain import run_chain

__all__ = ["run_chain"]
