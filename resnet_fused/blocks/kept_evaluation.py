"""Evaluation of a program: with running statistics and without autograd, by steps and weights that are kept."""

from __future__ import annotations

import itertools
import math
import operator
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import library
from ..backends import bounds, onednn
from ..backends.selfcheck import judge
from ..plan import choose
from ..plan.keys import threads
from ..plan.lower_evaluation import lower, takes
from ..steps import folding
from ..steps.conv import channels_last
from ..steps.evaluation_flow import Evaluation, Lowered
from ..steps.evaluation_kinds import WinogradConvolution
from ..steps.flow import Handed
from ..steps.folding import Folded, fold
from ..steps.program import Averaging, Call, Convolution
from ..steps.spec import StepTensors
from .unchanged import Forms

__all__ = ["evaluate", "takes", "way_of"]

Modules = Sequence[nn.Module | None]


class Recent(NamedTuple):
    """The last answer of :func:`_packed` for a program, and what it was asked for.

    A write moves a tensor's version counter, or, where it bypasses that (``p.data.mul_()``), changes its content.
    """

    case: tuple  # steps and shapes
    places: list[tuple | None]  # of the tensors, all dense
    sums: list[int]  # of their content
    made: list[Folded | None] | None
    settled: bool  # asked twice, so that every weight is in the layout that oneDNN wants


#: Both by the program's last module.
_recent: weakref.WeakKeyDictionary[nn.Module, Recent] = weakref.WeakKeyDictionary()
_lowered: weakref.WeakKeyDictionary[nn.Module, Forms] = weakref.WeakKeyDictionary()


def evaluate(
    call: Call, modules: Modules | None = None, dtype: torch.dtype | None = None, handed: Handed | None = None
) -> Tensor | None:
    """The output of a call that :func:`takes` takes; None: stock's operations are to run.

    Args:
        modules: of each node or None; by them folded weights are kept, and by the last one steps. None: nothing is.
        dtype: of the convolutions' parameters as stock would cast them; None: as they are.
        handed: whether nobody else has the input, whose memory the output may take, and where else it may be written.

    Raises:
        ValueError: only the node of training can run this.
    """
    if call.sample_factor is not None:
        raise ValueError("evaluation takes no factor for each sample")
    with torch.no_grad():
        way = way_of(call, modules, dtype)
        return None if way is None else way(call, handed or Handed())


class Way(NamedTuple):
    """How a call is evaluated, and all others that are the same to :func:`way_of`."""

    lowered: Lowered
    modules: Modules | None
    dtype: torch.dtype | None
    last: nn.Module | None  # by which what steps are made from is kept; with it the CPU backend runs them all
    folds: bool  # whether steps are made from parameters

    def __call__(self, call: Call, handed: Handed) -> Tensor | None:
        """The output; None: stock's operations are to run, as folding is not the same."""
        lowered = self.lowered
        if not self.folds:
            call, made = _cast(call, self.dtype), [None] * len(lowered.steps)
        elif self.last is None:
            made = [None if step.part is None else Folded(*fold(call, step.part, self.dtype)) for step in lowered.steps]
        else:
            made = _packed(call, lowered, self.modules, self.last)
        return None if made is None else self.run(call, made, handed)

    def run(self, call: Call, made: list[Folded | None], handed: Handed) -> Tensor:
        """The output by steps that are made from `made`."""
        lowered, inputs = self.lowered, _inputs(call)
        direct = self.last is not None and call.x.dtype == torch.float32 and not torch._C._len_torch_dispatch_stack()
        e = Evaluation(call, inputs, direct)
        e.owned, e.into = handed.owned, handed.into
        if not self.folds or self.last is None:
            return lowered.run(e, made)
        with bounds.private():
            bound_of = [bounds.of if wanted else bounds.noted for wanted in lowered.measured]
            e.bounds = [of(x) for of, x in zip(bound_of, inputs, strict=True)] + [math.inf] * len(call.program.nodes)
            out = lowered.run(e, made)
            return bounds.remember(out, e.bounds[-1]) if e.direct else out

    def sources(self, tensors: Sequence[StepTensors]) -> list[Tensor]:
        """What is folded of the tensors of a call."""
        return [t for node in self.lowered.folded for t in _of_node(tensors[node]) if t is not None]

    def settled(self) -> Recent | None:
        """What the steps of the last call were made from; None where the next one's may be made anew, or is stock's."""
        recent = _recent.get(self.last)
        if recent is None or recent.made is None or not recent.settled or recent.case[-1] is not self.lowered:
            return None
        return recent


def way_of(call: Call, modules: Modules | None, dtype: torch.dtype | None) -> Way | None:
    """How a call is evaluated, see :func:`evaluate`; None: by stock's operations."""
    last = next((module for module in reversed(modules or ()) if module is not None), None)
    on_gpu = choose.on_gpu(call.x)
    lowered = _steps_of(_cast(call, dtype) if on_gpu else call, last)
    if lowered is None:
        return None
    keeps = last is not None and not on_gpu and _can_pack(call, dtype)
    return Way(lowered, modules, dtype, last if keeps else None, bool(lowered.folded) and not on_gpu)


def _cast(call: Call, dtype: torch.dtype | None) -> Call:
    return call if dtype is None else call._replace(tensors=[own.cast(dtype) for own in call.tensors])


def _inputs(call: Call) -> list[Tensor]:
    x = channels_last(call.x)
    if call.program.inputs == 1:
        return [x]
    return [x, x if call.residual is call.x else channels_last(call.residual)]


def _steps_of(call: Call, module: nn.Module | None) -> Lowered | None:
    """The steps of a call, kept by `module` for all that they depend on; None: stock's."""
    if module is None or type(call.x) is not Tensor or torch.compiler.is_compiling() or choose.is_asked():
        return lower(call)
    residual = None if call.residual is None else call.residual.shape
    weights = [(own.weight.shape, own.bias is None) for own in call.tensors if own.weight is not None]
    dtypes = [t.dtype for own in call.tensors for t in own[:6] if t is not None]
    settings = call.program.precision, choose.fuses_all(), threads(), judge.count_of_changes()
    key = call.x.shape, residual, call.x.dtype, call.x.device, *settings, *weights, *dtypes
    kept = _lowered.setdefault(module, Forms())
    program, lowered = kept.get(key, (None, None))
    if program != call.program:
        lowered = lower(call)
        kept[key] = call.program, lowered
    return lowered


def _can_pack(call: Call, dtype: torch.dtype | None) -> bool:
    """Whether prepacked weights may be kept: outside of any tracing, where the CPU backend would run the case."""
    x = call.x
    if torch.compiler.is_compiling() or type(x) is not Tensor or call.program.backend not in ("auto", "cpu"):
        return False
    if not library.status().cpu.loaded or x.device.type != "cpu" or x.dtype not in onednn.SERVED:
        return False
    weights = [own.weight for own in call.tensors if own.weight is not None] if dtype is None else []
    return all(weight.dtype == x.dtype for weight in weights) and dtype in (None, x.dtype)


def _packed(call: Call, lowered: Lowered, modules: Modules, last: nn.Module) -> list[Folded | None] | None:
    """What the steps of a call are made from; None, where one may overflow."""
    positions = [t for node in lowered.folded for t in _of_node(call.tensors[node])]
    residual = None if call.residual is None else call.residual.shape
    case = (call.x.shape, residual, call.x.dtype, threads(), lowered)
    places = [
        t if t is None else (id(t), -1 if t.is_inference() else t._version, t.data_ptr(), t.dtype, t.shape, t.stride())
        for t in positions
    ]
    recent = _recent.get(last)
    dense = flat = [t for t in positions if t is not None]
    if recent is None or recent.places != places:
        recent, dense = None, [t if is_dense(t) else t.contiguous() for t in flat]
    sums = torch.ops.resnet_fused.checksum(dense)
    again = recent is not None and recent.sums == sums and recent.case == case
    if again and recent.settled:
        return recent.made
    made = _made(call, lowered, modules, places, sums)
    if dense is flat or all(map(operator.is_, dense, flat)):
        _recent[last] = Recent(case, places, sums, made, again)
    return made


def _made(call: Call, lowered: Lowered, modules: Modules, places: list, sums: list[int]) -> list[Folded | None] | None:
    """What each step is made from, kept or made now; None where one may overflow."""
    shapes, first, found = call.shapes(), call.program.inputs, []
    # Of each node, what a part of it is made from: settings, and place and content of each tensor (or None). The
    # content is that of the memory, in its own order, so that shape and strides belong to it.
    content, keys = iter(sums), {}
    contents = iter([place if place is None else (place, next(content)) for place in places])
    for index in lowered.folded:
        node, count = call.program.nodes[index], len(_of_node(call.tensors[index]))
        keys[index] = (node.conv if isinstance(node, Convolution) else node.norm, *itertools.islice(contents, count))
    for step in lowered.steps:
        if step.part is None:
            found.append(None)
            continue
        nodes = [value - first for value in step.part if value is not None]
        key = tuple(keys[node] for node in nodes)
        outputs = step.outputs if isinstance(step, WinogradConvolution) else None
        read = shapes[step.source]
        if isinstance(call.program.maker(step.value), Averaging):  # which has made it smaller
            read = torch.Size((*read[:2], *shapes[step.value][2:]))
        found.append(folding.packed(modules[nodes[-1]], call, step.part, key, read, outputs))
    return None if any(one is not None and one.enlarges + one.bound == math.inf for one in found) else found


def _of_node(own: StepTensors) -> tuple[Tensor | None, ...]:
    """The tensors that are folded of a node: a convolution's two or a norm's four."""
    return own[2:6] if own.weight is None else own[:2]


def is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
