"""Count what a program moves and computes, from its operations on fake tensors: nothing is run.

Each operation reads its tensors once and writes its results once; views cost nothing, of an expanded tensor what lies
in memory counts. A few ATen operations differ by their algorithm:

* Training batch norm reads its input for the statistics and again to normalise; its backward reads gradient and input
  for the two sums and again to apply them. With running statistics each is one pass, but for the weight's gradient.
* A convolution's backward is two kernels that both read the gradient; one that nobody asked for is not counted. With a
  stride beyond its kernel's size a convolution reads only the pixels that it uses; its backward still writes them all.
* Max pooling's backward reads gradient and indices (int64), not its input, whose shape alone it needs.
* What only overwrites its first argument does not read it.

ResNet-50, batch 256, 224x224, 16-bit, in MB per image, beside `design.md`'s 122 + 340: 125.1 in convolutions (with
weights, and the zeros that three strided projections write into their input's gradient: the table has neither), 340.8
in batch norm, ReLU and adds, and 7.7 in pooling and the last layer, which the table leaves out.
"""

from __future__ import annotations

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..ops import OPS
from ..plan.devices import Operation

Tensor = torch.Tensor
aten = torch.ops.aten

BATCH_NORM = {  # forward, and where among its arguments it is told to use the batch's statistics
    aten.native_batch_norm: 5,
    aten._native_batch_norm_legit: 5,
    aten.cudnn_batch_norm: 5,
    aten._batch_norm_with_update: None,  # always
}
BATCH_NORM_BACKWARD = {
    aten.native_batch_norm_backward: 7,
    aten.batch_norm_backward: 7,
    aten.cudnn_batch_norm_backward: None,
}
_OVERWRITES = {aten.copy_, aten.zero_, aten.fill_, aten.bernoulli_, aten.normal_, aten.uniform_}
_FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach}
_OWN = ("resnet_fused", "resnet_fused_auto", "resnet_fused_triton")


class Traffic:
    """What a program's operations move and compute: each, and in sum."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    @property
    def bytes(self) -> int:
        return sum(operation.bytes for operation in self.operations)

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.operations)

    @property
    def launches(self) -> int:
        return sum(operation.launches for operation in self.operations)


class Counter(TorchDispatchMode):
    """Notes every operation dispatched while it is on, in `total`."""

    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.total = Traffic()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace in _OWN and func._schema.name.split("::")[1] in OPS:
            for counted in own_operations(func, args, kwargs, out):
                self.note(func, args, kwargs, out, counted)
        elif func.namespace != "prim" and not is_free(func, args, kwargs, out):
            self.note(func, args, kwargs, out, operation(func, args, kwargs, out))
        return out

    def note(self, func, args, kwargs, out, counted: Operation) -> None:
        """Called with every operation that costs something."""
        self.total.operations.append(counted)

    def keep(self, *results: Tensor | None) -> None:
        """Called with the results of the forward pass and with those of the backward pass, at the end of each."""


def is_free(func, args, kwargs, out) -> bool:
    """Whether `func` moves nothing: a view, an allocation, or a result that is an argument's memory anyway."""
    if func.is_view or func._overloadpacket in _FREE:
        return True
    if func._schema.is_mutable:
        return func._overloadpacket is aten.as_strided_
    memory = {storage(t) for t in tensors((args, kwargs))}
    results = tensors(out)
    return bool(results) and all(storage(t) in memory for t in results)


def own_operations(func, args, kwargs, out) -> list[Operation]:
    """One of this package's ops, or those that it stands for."""
    parts, dtype = OPS[func._schema.name.split("::")[1]].parts, data_dtype(args, kwargs, out)
    if parts is None:
        return [own_operation(func, args, kwargs, out)]
    return [Operation(name, OPS[name].bytes(*given), OPS[name].flops(*given), dtype, 1) for name, given in parts(*args)]


def own_operation(func, args, kwargs, out) -> Operation:
    """One of this package's ops, by its own contract."""
    name = func._schema.name.split("::")[1]
    arguments = {key: value for key, value in kwargs.items() if key != "backend"}
    op = OPS[name]
    launches = op.launches([t for t in tensors(out) if t.numel()])
    counted = op.bytes(*args, **arguments), op.flops(*args, **arguments)
    in_full = op.full_flops(*args, **arguments)
    return Operation(name, *counted, data_dtype(args, kwargs, out), launches, in_full)


def operation(func, args, kwargs, out) -> Operation:
    """Any other operation."""
    packet, moved, launches = func._overloadpacket, None, 1
    if packet is aten.convolution:
        moved = nbytes(*args[1:3], out) + used_bytes(args[0], args[1], out, args[3], args[6])
    elif packet is aten.convolution_backward:
        moved, launches = _convolution_backward(args, out)
    elif packet is aten.max_pool2d_with_indices_backward:
        moved = nbytes(args[0], args[-1], out)
    elif packet in BATCH_NORM_BACKWARD:
        moved, launches = _batch_norm_backward(uses_batch(func, args), args, out)
    else:
        written, mutated = tensors(out), mutable(func, args)
        written += [t for t in mutated if all(t is not w for w in written)]
        read = tensors((args[1:] if packet in _OVERWRITES else args, kwargs))
        moved = nbytes(*read, *written)
        if packet in BATCH_NORM and uses_batch(func, args):
            moved, launches = moved + nbytes(args[0]), 2
    flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
    if packet is aten.convolution_backward and args[9] > 1:  # PyTorch counts a weight gradient as one without groups
        grad, x, weight, *_, mask = args
        pixels = (x if args[7] else grad)[:, 0].numel()
        flops = 2 * pixels * weight.numel() * sum(mask[:2])
    return Operation(func._schema.name, moved, flops, data_dtype(args, kwargs, out), launches)


def uses_batch(func, args) -> bool:
    """Whether a batch norm, or its backward, is told to use the batch's statistics."""
    packet = func._overloadpacket
    where = (BATCH_NORM if packet in BATCH_NORM else BATCH_NORM_BACKWARD)[packet]
    if func._overloadname == "no_stats":
        where = 3
    return where is None or bool(args[where])


def _batch_norm_backward(batch: bool, args, out) -> tuple[int, int]:
    grad, z, vectors = args[0], args[1], [t for t in tensors(args[2:]) if t.dim() == 1]
    grad_z, *sums = tensors(out) if isinstance(out, tuple | list) else [out]
    reduces = batch or bool(sums)
    moved = nbytes(*vectors, *sums, grad_z, grad, z if batch else None) + (nbytes(grad, z) if reduces else 0)
    return moved, 2 if reduces else 1


def _convolution_backward(args, out) -> tuple[int, int]:
    grad, x, weight = args[:3]
    grad_x, grad_weight, grad_bias = out
    kernels = []
    if grad_x is not None:
        kernels.append(nbytes(grad, weight, grad_x))
    if grad_weight is not None:
        kernels.append(nbytes(grad, grad_weight) + used_bytes(x, weight, grad, args[4], args[7]))
    if grad_bias is not None:
        kernels.append(nbytes(grad, grad_bias))
    return sum(kernels), len(kernels)


def used_bytes(x: Tensor, weight: Tensor, out: Tensor, stride, transposed: bool) -> int:
    """Bytes of `x` that a convolution reads: a stride beyond the kernel's size passes some pixels over."""
    if transposed:
        return nbytes(x)
    steps = list(stride) * (x.dim() - 2 if len(stride) == 1 else 1)
    pixels = 1
    for size, outputs, kernel, step in zip(x.shape[2:], out.shape[2:], weight.shape[2:], steps, strict=True):
        pixels *= min(size, outputs * kernel) if step > kernel else size
    return x.shape[0] * x.shape[1] * pixels * x.element_size()


def nbytes(*given: Tensor | None) -> int:
    """Bytes that lie in memory: an expanded dimension counts once."""
    return sum(_elements(t) * t.element_size() for t in given if t is not None)


def _elements(t: Tensor) -> int:
    return math.prod(size for size, step in zip(t.shape, t.stride(), strict=True) if step) if t.numel() else 0


def tensors(tree: object) -> list[Tensor]:
    """The tensors in a nest of arguments or results, each once."""
    unique = {id(t): t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
    return list(unique.values())


def mutable(func, args) -> list[Tensor]:
    """The positional arguments that `func` writes."""
    named = zip(func._schema.arguments, args, strict=False)
    return [arg for info, arg in named if info.is_write and isinstance(arg, torch.Tensor)]


def storage(t: Tensor) -> int:
    """What names the memory that `t` lies in."""
    return t.untyped_storage()._cdata


def data_dtype(*trees: object) -> torch.dtype:
    """Dtype of the largest floating-point tensor; of any tensor if none is."""
    given = sorted(tensors(trees), key=lambda t: (t.is_floating_point(), t.numel()))
    return given[-1].dtype if given else torch.float32


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
