"""The CPU backend: compiled loops of the first library, and oneDNN's convolutions with post-ops."""

from .declaration import Backend

BACKEND = Backend(name="cpu", devices=("cpu",), kernels={}, unavailable="its kernels are not written yet")
