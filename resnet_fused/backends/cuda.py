"""The CUDA C++ backend: kernels of the second compiled library, on NVIDIA GPUs."""

from .declaration import Backend

BACKEND = Backend(name="cuda", devices=("cuda",), kernels={}, unavailable="its kernels are not written yet")
