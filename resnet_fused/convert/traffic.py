"""Count what a program moves and computes, from its operations on fake tensors: nothing is run.

Each operation reads its tensors once and writes its results once; views cost nothing. Three ATen operations pass more
often over a tensor than they have it as argument, by their algorithm: training batch norm reads its input for the
statistics and again to normalise, its backward reads gradient and input twice, and a convolution's backward is two
kernels that both read the gradient.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..ops import OPS

Tensor = torch.Tensor
aten = torch.ops.aten

#: Arguments, by position, that an operation reads a second time.
_READ_TWICE = {
    aten.native_batch_norm: (0,),
    aten._native_batch_norm_legit: (0,),
    aten.cudnn_batch_norm: (0,),
    aten._batch_norm_with_update: (0,),
    aten.native_batch_norm_backward: (0, 1),
    aten.cudnn_batch_norm_backward: (0, 1),
    aten.batch_norm_backward: (0, 1),
    aten.convolution_backward: (0,),
}
_FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach}
_OWN = ("resnet_fused", "resnet_fused_auto", "resnet_fused_triton")


@dataclasses.dataclass
class Traffic:
    """Bytes moved and floating-point operations."""

    bytes: int = 0
    flops: int = 0


class Counter(TorchDispatchMode):
    """Adds up :class:`Traffic` over every operation dispatched while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.total = Traffic()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        name = func._schema.name.split("::")[1]
        if func.namespace in _OWN and name in OPS:
            own = {key: value for key, value in kwargs.items() if key != "backend"}
            self.total.bytes += OPS[name].bytes(*args, **own)
            self.total.flops += OPS[name].flops(*args, **own)
        elif func.namespace != "prim" and not func.is_view and packet not in _FREE:
            self.total.bytes += _bytes(packet, args, kwargs, out)
            if packet in flop_registry:
                self.total.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


def _bytes(packet, args, kwargs, out) -> int:
    reads = _tensors((args, kwargs))
    writes = [t for t in _tensors(out) if all(t is not r for r in reads)]
    if len(writes) < len(_tensors(out)) or not _tensors(out):
        writes += reads[:1]  # in place: the first argument is written too
    again = [args[i] for i in _READ_TWICE.get(packet, ()) if isinstance(args[i], torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in (*reads, *writes, *again))


def _tensors(tree: object) -> list[Tensor]:
    unique = {id(t): t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
    return list(unique.values())


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for backward while it is on: each storage once, those in `ignore` not at all."""

    def __init__(self, ignore: list[Tensor]) -> None:
        self.seen: dict[int, int] = {}
        ignored = {t.untyped_storage()._cdata for t in ignore}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in ignored:
                self.seen[storage._cdata] = storage.nbytes()
            return t

        super().__init__(pack, lambda t: t)

    @property
    def bytes(self) -> int:
        return sum(self.seen.values())
