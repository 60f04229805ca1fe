"""Memory that outputs on CPUs of 2 MiB and more come from, kept as PyTorch keeps a GPU's (csrc/cpu/kept_memory.cpp)."""

from __future__ import annotations

import torch

from .. import library


def empty_cache() -> int:
    """Give the memory that fused operations keep on the CPU, and that no tensor has, back to the system.

    Outputs of 2 MiB and more come from pages that are kept when their last tensor dies, so that a training step does
    not fault its activations in anew. All pages together are at most 1.25 times those that held tensors at once lately;
    the system may take free ones when it is short of memory. Addresses for all of the machine's memory are reserved at
    the first such output, or a quarter of a limit on them (``ulimit -v``; below 4 GiB nothing is kept). A tensor on
    such pages cannot be resized beyond what it has (``resize_``, ``out=`` of a larger result,
    ``untyped_storage().resize_``): PyTorch raises a RuntimeError. The environment variable
    ``RESNET_FUSED_KEEP_MEMORY=0`` turns all of this off; with torch 2.10, which has no tensors with a deleter in its
    stable ABI, nothing is kept. The name is that of :func:`torch.cuda.empty_cache`.

    Returns:
        The bytes that were given back; 0 where the compiled library is not loaded.
    """
    return torch.ops.resnet_fused.empty_cache() if library.status().cpu.loaded else 0
