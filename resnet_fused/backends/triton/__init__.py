"""The Triton backend (placeholder until its kernels are written)."""

from ..declaration import Backend

BACKEND = Backend(name="triton", devices=("cuda",), kernels={}, unavailable="its kernels are not written yet")
