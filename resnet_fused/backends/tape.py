"""What a function of tensors dispatches, found out once by listening to a call, and repeated without the function.

Between two calls of one form (shapes, strides, dtypes, devices, settings: all that its Python reads) a block's steps
decide the same again; only the tensors differ. A :class:`Tape` is what is left then: the calls of the dispatcher, in
order, as a graph of ``torch.fx``, whose code is a straight line. What it cannot say ends the recording, and the
function is called for ever: tensors from elsewhere, results that are no tensors, by which it may have chosen.
"""

from __future__ import annotations

import functools
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._C._dynamo import guards
from torch.utils._python_dispatch import TorchDispatchMode

from . import dispatch
from .declaration import Kernel

Tensor = torch.Tensor
PLAIN = 4  # calls of a form before one is listened to
aten = torch.ops.aten
_BY_VALUE = frozenset((torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output))
#: Whose results are laid out as settings of PyTorch's and its libraries say, which are no part of a form.
_LAID_OUT = (aten.convolution.default, aten.convolution_backward.default)


class _Scope(threading.local):
    listener: _Listener | None = None


_scope = _Scope()


def laid_out(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`t` with these strides."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def _empty_on_cpu(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return guards._empty_strided_cpu(shape, stride, dtype)


def _empty_on_gpu(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return guards._empty_strided_cuda(shape, stride, dtype)


def _allocate_short(graph: fx.Graph) -> int | None:
    """Allocate as Inductor's code does, without the dispatcher, in half the time; on two GPUs there is no such way.

    Returns the GPU that is to be the current one; it has not run on hardware.
    """
    nodes = [node for node in graph.nodes if node.target is torch.empty_strided]
    devices = {node.kwargs["device"] for node in nodes}
    if len(devices) > 1 or not all(device.type in _SHORT for device in devices):
        return None
    for node in nodes:
        node.target = _SHORT[node.kwargs["device"].type]
        node.args, node.kwargs = (*map(tuple, node.args), node.kwargs["dtype"]), {}
    return next((device.index for device in devices if device.type == "cuda"), None)


_SHORT = {"cpu": _empty_on_cpu, "cuda": _empty_on_gpu}


class Tape:
    """Tensors (or None) -> tensors (or None), of one form, by the dispatcher's calls alone."""

    def __init__(
        self, graph: fx.Graph, kernels: list[tuple[dict[str, Kernel], str, Kernel]], twice: list[tuple[int, int]]
    ) -> None:
        """`kernels`: that ran our ops. `twice`: places of the same tensor among those that are given."""
        self._kernels, self._twice, self._gpu = kernels, twice, _allocate_short(graph)
        made = graph.python_code("self")
        self.code, names = made.src, dict(made.globals)
        exec(compile(self.code, "<tape>", "exec"), names)  # a GraphModule's code is kept for ever
        self.repeat: Callable[..., list[Tensor | None]] = functools.partial(names["forward"], None)

    @property
    def runs_on(self) -> tuple | None:
        """What :meth:`holds` looks at, the same for tapes of which one answers for all; None where `takes` asks too."""
        return (
            None if self._twice else (self._gpu, *((id(found), op, id(kernel)) for found, op, kernel in self._kernels))
        )

    def holds(self) -> bool:
        """Whether the same kernels would run our ops, and allocations come from the current GPU."""
        if self._gpu is not None and self._gpu != torch.cuda.current_device():
            return False
        return all([kernels.get(op) is kernel for kernels, op, kernel in self._kernels])  # noqa: C419 (is faster)

    def takes(self, given: Sequence[Tensor | None]) -> bool:
        """Whether the same tensors are the same."""
        return not self._twice or all(given[i] is given[j] for i, j in self._twice)


class _Listener(TorchDispatchMode):
    """Writes down what a function does with the tensors that it is given."""

    sees_fused_ops = True

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.graph, self.spoilt = fx.Graph(), ""
        self.kernels: list[tuple[dict[str, Kernel], str, Kernel]] = []
        self.paused = False
        self._nodes: dict[int, tuple[weakref.ref, fx.Node]] = {}  # by ids, which others get when a tensor is freed
        for i, t in enumerate(given):
            node = self.graph.placeholder(f"given_{i}")
            if t is not None:
                self._know(t, node)
        first = {id(t): i for i, t in reversed([*enumerate(given)])}
        self._twice = [(first[id(t)], i) for i, t in enumerate(given) if t is not None and first[id(t)] != i]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not _BY_VALUE.isdisjoint(func.tags):
            self.spoilt = f"{func} depends on values"
        if func._schema.is_mutable and func.name().startswith("aten::_foreach_"):
            torch.autograd.graph.increment_version(args[0])  # which PyTorch forgets below a mode
        self.note(func, args, kwargs or {}, result)
        return result

    def note(self, func: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        """One call, and what it returned."""
        if self.spoilt or self.paused:
            return
        ours, short = dispatch.declared(func), None
        if ours is not None:
            self.kernels.append(ours)
            short = ours[-1].prepare(args, kwargs)
        try:
            placed, by_name = fx.node.map_aggregate((args, kwargs), self._place)
        except LookupError:
            self.spoilt = f"{func} reads a tensor from elsewhere"
            return
        if short is not None:
            made = short.write(self.graph, [*placed, *by_name.values()], args[0].device)
        else:
            made = self.graph.call_function(func, placed, by_name)
            if isinstance(result, tuple | list):
                made = [self.graph.call_function(operator.getitem, (made, i)) for i in range(len(result))]
        many = isinstance(result, tuple | list)
        for t, node in zip(result, made, strict=True) if many else [(result, made)]:
            if isinstance(t, Tensor):
                self._know(t, self._laid_out(t, node) if func in _LAID_OUT else node)
            elif t is not None:
                self.spoilt = f"{func} returns what is no tensor"

    def _laid_out(self, t: Tensor, node: fx.Node) -> fx.Node:
        return self.graph.call_function(laid_out, (node, t.stride()))

    def _know(self, t: Tensor, node: fx.Node) -> None:
        """`t` is what `node` makes; one that was known was written to, and is still what it was called."""
        if not self._is_known(t):
            self._nodes[id(t)] = (weakref.ref(t), node)

    def _is_known(self, t: Tensor) -> bool:
        known = self._nodes.get(id(t))
        return known is not None and known[0]() is t

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not self._is_known(value):
            raise LookupError("a tensor from elsewhere")
        return self._nodes[id(value)][1]

    def tape(self, results: Sequence[Tensor | None]) -> Tape | None:
        """What has been written down, with these as its results; None where something was not to be."""
        if self.spoilt or any(t is not None and not self._is_known(t) for t in results):
            return None
        self.graph.output([self._place(t) for t in results])
        for node in reversed(self.graph.nodes):
            if node.target is torch.empty_strided and not node.users:  # which nobody writes to: of no elements
                self.graph.erase_node(node)
        return Tape(self.graph, self.kernels, self._twice)


def noted(function: Callable, *args: Any) -> Any:
    """``function(*args)``, which the dispatcher does not see as what it is, for a tape too."""
    listener = _scope.listener
    if listener is None:
        return function(*args)
    listener.paused = True
    result = function(*args)
    listener.paused = False
    listener.note(function, args, {}, result)
    return result


class Repeated:
    """A function for calls of one form: called :data:`PLAIN` times, then listened to, then repeated by its tape.

    The first call may check kernels, compile and fill caches, which is no part of it; and listening takes as long as
    some 30 calls save, which images of ever new sizes never do. `beside`: what the function returns beside tensors,
    the same for all calls of one form.
    """

    def __init__(self) -> None:
        self.tape: Tape | None = None
        self.beside: Any = None
        self._calls = 0

    def __call__(
        self, function: Callable[..., tuple[list[Tensor | None], Any]], given: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], Any]:
        if self.tape is not None:
            if self.tape.holds() and self.tape.takes(given):
                return self.tape.repeat(*given), self.beside
            return function(*given)
        self._calls += 1
        if self._calls != PLAIN + 1:
            return function(*given)
        _scope.listener = listener = _Listener(given)
        try:
            with listener:
                results, self.beside = function(*given)
        finally:
            _scope.listener = None
        self.tape = listener.tape(results)
        return results, self.beside
