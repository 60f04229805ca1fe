"""What ``torch.compile`` would move: stock's operations, with pointwise work and reductions fused as far as they go.

From one fake run of the stock model. Inductor leaves convolutions, matrix products and pooling as they are (they read
tensors in memory and write tensors to memory) and makes kernels of the rest. The rules, by operation:

* Pointwise (ReLU, add, scaling, their backwards; batch norm with running statistics): costs nothing of its own. Its
  result is an expression of what it reads, evaluated again in every kernel that reads it.
* A convolution, matrix product or pooling reads memory: an expression among its arguments is first written by a kernel
  that reads each of the expression's tensors once. So normalise, add and ReLU after a convolution cost one read of z,
  one of the residual and one write; of a projection shortcut one more read of its z and nothing else.
* Batch norm on batch statistics: one kernel that reads z, and then an expression of z and per-channel vectors.
* Its backward: one kernel that reads gradient (an expression of the gradient in memory and, for the ReLU's mask, the
  saved output) and z for the sums; then an expression of the same, which reads them again where it is written for the
  convolution.
* Where that gradient has other readers too (a residual fork, a projection), the kernel of the sums writes it, if
  reading it is cheaper than evaluating it each time. So two gradients are added, masked and written in the kernel that
  sums.
* Other reductions (mean, sum) are one read.
* Two kernels over equally large tensors that share one and need not wait for each other are one: the batch norms of the
  main path and of the projection read their common gradient once, and so do their applications.
* Max pooling's indices are int8, as inductor's are, instead of int64.
* Everything else (concatenation, other normalisations, random numbers) as in stock, though inductor may do better.

ResNet-50, batch 256, 224x224, 16-bit, in MB per image: 125.1 in convolutions, as in stock, 226.9 around them and 4.5
in pooling's own passes and the last layer, beside `design.md`'s 122 + 229. A block by itself is dearer than in a model,
where the sum of its input's two gradients belongs to the kernel of the block before.

This is the best case for ``torch.compile``. Inductor's own scheduler, asked how much its kernels around the
convolutions of ResNet-50 move (torch 2.13, bfloat16, batch 8, Triton's scheduling on CPU tensors, without pooling;
nothing was generated or run), counts 72 MB per image forward, as these rules do, but 189 MB backward where they come to
155: at every second fork it keeps the gradient as an expression of five tensors, at the others it writes the gradient
and sums it in two kernels, and the stem's gradient is float32.
"""

from __future__ import annotations

import dataclasses

import torch

from ..plan.devices import Operation
from . import count
from .count import Counter, Traffic, nbytes, storage, tensors

Tensor = torch.Tensor
aten = torch.ops.aten

_POINTWISE = {aten._to_copy, aten.copy_, aten.hardswish, aten.hardswish_, aten.hardswish_backward}
_MAX_POOL = {aten.max_pool2d_with_indices, aten.max_pool2d_with_indices_backward}


@dataclasses.dataclass(eq=False)
class _Value:
    """A tensor at one moment (an operation in place makes a new one)."""

    bytes: int
    uses: int = 0  # operations that are still to read it
    parts: dict[_Value, int] | None = None  # of an expression: what a kernel reads to have it, with bytes; else None
    ready: int = 0  # of a tensor in memory: the first kernel, by number, that can have it


@dataclasses.dataclass
class _Node:
    kind: str  # "pointwise", "reduce", "norm", "norm_backward", "extern", "keep"
    reads: list[tuple[_Value, int]]
    writes: list[_Value]
    stock: Operation


@dataclasses.dataclass(eq=False)
class _Kernel:
    name: str
    reads: dict[_Value, int]
    writes: dict[_Value, int]
    dtype: torch.dtype
    extern: Operation | None = None

    @property
    def largest(self) -> int:
        return max(self.reads.values(), default=0)

    def shares(self, reads: dict[_Value, int]) -> bool:
        """Whether another kernel with these reads runs over equally large tensors, one of them the same."""
        size = max(reads.values(), default=0)
        return self.largest == size and any(reads.get(value) == size for value in (*self.reads, *self.writes))


class FusingCounter(Counter):
    """Counts stock's operations into `total` as its base does, and notes what :meth:`compiled` needs."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[_Node] = []
        self.values: dict[int, _Value] = {}  # by the memory's name: what lies there now
        self.alive: list[Tensor] = []  # so that no memory's name is used twice

    def note(self, func, args, kwargs, out, counted: Operation) -> None:
        super().note(func, args, kwargs, out, counted)
        given, results = tensors((args, kwargs)), tensors(out)
        if max((t.numel() for t in (*given, *results)), default=0) <= 1:
            return  # counters of batches ride along in any kernel
        kind, packet = _kind(func, args), func._overloadpacket
        read = [t for t in given if not (packet in count._OVERWRITES and t is args[0])]
        if packet in _MAX_POOL:
            counted = dataclasses.replace(counted, bytes=counted.bytes - 7 * _indices(packet, args, out).numel())
        written = results + [t for t in count.mutable(func, args) if kind == "extern"]
        self._append(kind, read, written, counted)

    def keep(self, *results: Tensor | None) -> None:
        """The results of a graph: what follows is another one."""
        given = [t for t in results if t is not None]
        self._append("keep", given, [], Operation("keep", 0, 0, torch.float32, 0))

    def _append(self, kind: str, read: list[Tensor], written: list[Tensor], counted: Operation) -> None:
        reads = [(self._value(t), nbytes(t)) for t in read]
        for value, _ in reads:
            value.uses += 1
        self.alive += read + written
        writes = [_Value(nbytes(t)) for t in written]
        self.values |= {storage(t): value for t, value in zip(written, writes, strict=True)}
        self.nodes.append(_Node(kind, reads, writes, counted))

    def _value(self, t: Tensor) -> _Value:
        return self.values.setdefault(storage(t), _Value(nbytes(t)))

    def compiled(self) -> Traffic:
        """What the operations come to when they are compiled. Call it once, at the end."""
        fusion = _Fusion()
        for node in self.nodes:
            fusion.add(node)
        return fusion.traffic()


def _kind(func, args) -> str:
    packet = func._overloadpacket
    if packet in count.BATCH_NORM:
        return "norm" if count.uses_batch(func, args) else "pointwise"
    if packet in count.BATCH_NORM_BACKWARD:
        return "norm_backward"
    if torch.Tag.pointwise in func.tags or packet in _POINTWISE:
        return "pointwise"
    return "reduce" if torch.Tag.reduction in func.tags else "extern"


def _indices(packet, args, out) -> Tensor:
    return out[1] if packet is aten.max_pool2d_with_indices else args[-1]


class _Fusion:
    """Turns nodes, in order, into kernels."""

    def __init__(self) -> None:
        self.kernels: list[_Kernel] = []
        self.graph = 0  # the first kernel of this graph: forward and backward are compiled apart

    def add(self, node: _Node) -> None:
        for value, _ in node.reads:
            value.uses -= 1
        getattr(self, f"_{node.kind}")(node)

    def traffic(self) -> Traffic:
        found = Traffic()
        for kernel in self.kernels:
            moved = sum(kernel.reads.values()) + sum(kernel.writes.values())
            found.operations.append(kernel.extern or Operation(kernel.name, moved, 0, kernel.dtype))
        return found

    def _pointwise(self, node: _Node) -> None:
        parts = _parts(node.reads)
        for value in node.writes:
            value.parts = dict(parts)

    def _extern(self, node: _Node) -> None:
        self._store(node)
        self.kernels.append(_Kernel(node.stock.name, {}, {}, node.stock.dtype, node.stock))
        for value in node.writes:
            value.ready = len(self.kernels)

    def _keep(self, node: _Node) -> None:
        self._store(node)
        self.graph = len(self.kernels)

    def _store(self, node: _Node) -> None:
        for value, _ in node.reads:
            if value.parts is not None:
                self._write(value, self._kernel(value.parts, node.stock))

    def _reduce(self, node: _Node) -> _Kernel:
        kernel = self._kernel(_parts(node.reads), node.stock)
        for value in node.writes:
            self._write(value, kernel)
            value.ready += 1  # a sum is there when all of the kernel has run
        return kernel

    def _norm(self, node: _Node) -> None:
        y, *statistics = node.writes
        data = max(node.reads, key=lambda read: read[1])  # the others are per-channel vectors
        self._reduce(dataclasses.replace(node, reads=[data], writes=statistics))
        y.parts = _parts([*node.reads, *((value, value.bytes) for value in statistics)])

    def _norm_backward(self, node: _Node) -> None:
        largest = max(value.bytes for value, _ in node.reads)
        results = [value for value in node.writes[:1] if value.bytes == largest]
        sums = node.writes[len(results) :]
        kernel = self._reduce(dataclasses.replace(node, writes=sums))
        for value, _ in node.reads:
            later = value.uses + 1  # by the application of this batch norm, and by others
            if value.parts is not None and later * sum(value.parts.values()) > (later + 1) * value.bytes:
                self._write(value, kernel)
        for value in results:
            value.parts = _parts([*node.reads, *((total, total.bytes) for total in sums)])

    def _kernel(self, reads: dict[_Value, int], stock: Operation) -> _Kernel:
        """The kernel that reads `reads`: one that runs anyway, if it can wait for them, or a new one."""
        first = max([self.graph, *(value.ready for value in reads)])
        for kernel in self.kernels[first:]:
            if kernel.extern is None and kernel.shares(reads):
                kernel.reads |= {value: moved for value, moved in reads.items() if value not in kernel.writes}
                return kernel
        self.kernels.append(_Kernel(f"fused {stock.name}", dict(reads), {}, stock.dtype))
        return self.kernels[-1]

    def _write(self, value: _Value, kernel: _Kernel) -> None:
        kernel.writes[value] = value.bytes
        value.parts, value.ready = None, self.kernels.index(kernel)


def _parts(reads: list[tuple[_Value, int]]) -> dict[_Value, int]:
    """What a kernel loads that reads these."""
    found: dict[_Value, int] = {}
    for value, moved in reads:
        for part, size in ({value: moved} if value.parts is None else value.parts).items():
            found[part] = max(size, found.get(part, 0))
    return found
