"""What autograd keeps between forward and backward, and the peak of a GPU's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch

MB = 1e6


def saved_bytes(forward: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps alive for backward after `forward`, each storage once, parameters not counted.

    Counts what goes through saved-tensor hooks and, so that an autograd function cannot hide anything, also the
    tensors that a function of Python keeps as attributes of its context.
    """
    excluded = {storage_key(p) for p in parameters}
    kept: dict[object, torch.Tensor] = {}  # holds the tensors: a freed storage's address could come back

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(storage_key(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    for tensor in context_tensors(output.grad_fn):
        kept.setdefault(storage_key(tensor), tensor)
    return sum(storage_bytes(tensor) for key, tensor in kept.items() if key not in excluded)


def storage_key(tensor: torch.Tensor) -> object:
    """What two tensors on one storage share. Opaque tensors (oneDNN's) have no storage and stand for themselves."""
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr()


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the whole storage behind `tensor`: that is what stays allocated, however small the view."""
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    return tensor.untyped_storage().nbytes()


def context_tensors(node) -> Iterator[torch.Tensor]:
    """Tensors that Python autograd functions in the graph of `node` keep as attributes of their context."""
    seen, pending = set(), [node]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
        yield from tensors_in(getattr(node, "__dict__", {}))


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors in nested containers and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def peak_cuda_bytes(run: Callable[[], object]) -> int:
    """How far `run` raises the GPU memory in use above what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
