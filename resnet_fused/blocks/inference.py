"""Inference: batch norm folded into the convolutions, activation and residual in their epilogues.

The folded weights are kept between calls, packed as oneDNN wants them. They are made again when a tensor they came from
was replaced or written to: its version counter moved, or, for writes that bypass the counter (``p.data.mul_()``), its
content's checksum changed. The checksum reads all weights once, as fast as memory gives them.
"""

from __future__ import annotations

import collections
import math
import operator
import threading
import weakref
from typing import NamedTuple

import torch
from torch import nn

from .. import library
from ..backends import bounds, onednn, run
from ..ops.conv_add_relu import output_shape
from ..steps import Chain, Step, StepTensors, stock
from ..steps.batch_norm import running_affine
from ..steps.conv import channels_last
from ..steps.folded_join import Folded, shift_of
from . import gpu_inference

Tensor = torch.Tensor


class Packed(NamedTuple):
    """A convolution with its batch norm folded in."""

    weight: Tensor  # in the layout `layout`
    shift: Tensor  # [K]
    bound: float  # of the shift; see `bounds.of`
    enlarges: float  # see `bounds.of_weight`
    layout: bytes


class Kept(NamedTuple):
    """What is kept of a convolution and its norm. Never changed but replaced as a whole: threads may meet in it."""

    key: tuple  # what it was made from
    packed: dict[torch.dtype, tuple[Packed, ...]]  # of each dtype at most LAYOUTS, the newest last


#: oneDNN was seen to want up to three layouts of one weight over all image and batch sizes, and up to two from 4 pixels
#: a side on. With more, the oldest goes: memory is bounded by so many weights for each dtype that was asked for.
LAYOUTS = 3
#: By norm: a convolution may be followed by different ones.
_kept: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class _Layouts:
    """Which layout oneDNN wants for a convolution, by its geometry and its input's shape: found by packing a weight.

    At the first sight of a shape nothing is known, and a weight packed for another shape serves: oneDNN reorders it if
    it must, as it does stock's weights at every call. Only a shape that comes back is worth packing for.
    """

    LIMIT = 4096  # some ten image sizes of twenty networks; about 1 KB each

    def __init__(self) -> None:
        self._seen: collections.OrderedDict[tuple, bytes | None] = collections.OrderedDict()

    def look(self, case: tuple) -> tuple[bool, bytes | None]:
        """Whether `case` was seen before, and its layout if that is known."""
        with _lock:
            known = case in self._seen
            layout = self._seen.setdefault(case, None)
            self._seen.move_to_end(case)
            if len(self._seen) > self.LIMIT:
                self._seen.popitem(last=False)
        return known, layout

    def learn(self, case: tuple, layout: bytes) -> None:
        with _lock:
            self._seen[case] = layout


_layouts = _Layouts()


def fold(tensors: StepTensors, step: Step, like: torch.dtype, to: torch.dtype, wide: bool) -> tuple[Tensor, Tensor]:
    """Weight and shift of ``bn(conv(x))`` with running statistics, for `x` of dtype `like`.

    `to`: the weight's dtype, to which it is rounded once. `wide`: fold in float64, where the result is kept.
    """
    folded = Folded(running_affine(tensors, step.norm, torch.float64 if wide else like), None)
    weight = (tensors.weight.to(folded.bn.scale.dtype) * folded.bn.scale.view(-1, 1, 1, 1)).to(to)
    shift = shift_of(folded, tensors)
    return weight, shift.to(torch.float32) if wide else shift


def _keys(steps: tuple[Step, ...], tensors: list[StepTensors], checksums: list[int]) -> list[tuple]:
    """For each step, what its folded weight is made from: identity, version and content of each tensor (or None).

    The content is that of the memory, in its own order, so that the weight's shape and strides belong to it.
    """
    sums = iter(checksums)
    return [
        (step, own[0].shape, own[0].stride(), *(t if t is None else (*_identity(t), next(sums)) for t in own[:6]))
        for step, own in zip(steps, tensors, strict=True)
    ]


def _identity(t: Tensor) -> tuple:
    return id(t), -1 if t.is_inference() else t._version, t.data_ptr(), t.dtype


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def packed(
    norm: nn.Module, key: tuple, tensors: StepTensors, step: Step, shape: torch.Size, dtype: torch.dtype
) -> Packed:
    """The folded and prepacked convolution before `norm` for inputs of `shape` and `dtype`, kept or made now."""
    case = (dtype, tensors.weight.shape, step.conv, shape, torch.get_num_threads())
    seen, layout = _layouts.look(case)
    with _lock:
        kept = _kept.get(norm)
    there = kept.packed.get(dtype, ()) if kept is not None and kept.key == key else ()
    for one in reversed(there):
        if one.layout == layout or not seen:
            return one
    with torch.inference_mode(False), torch.no_grad():  # what is kept must serve in any mode
        weight, shift = fold(tensors, step, dtype, dtype, wide=True)
        weight = onednn.prepack(weight, shape, *step.conv.args)
        made = Packed(weight, shift, bounds.of(shift), bounds.of_weight(weight), onednn.layout_of(weight))
    _layouts.learn(case, made.layout)
    return _keep(norm, key, dtype, made)


def _keep(norm: nn.Module, key: tuple, dtype: torch.dtype, made: Packed) -> Packed:
    """Keep `made`, or return what is kept in its layout already."""
    with _lock:
        kept = _kept.get(norm)
        others = kept.packed if kept is not None and kept.key == key else {}
        there = others.get(dtype, ())
        for one in there:
            if one.layout == made.layout:
                return one
        _kept[norm] = Kept(key, {**others, dtype: (*there, made)[-LAYOUTS:]})
    return made


def _can_pack(x: Tensor, backend: str) -> bool:
    """Whether prepacked weights may be kept: outside of any tracing, where the CPU backend would run the case."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or backend not in ("auto", "cpu"):
        return False
    return library.status().cpu.loaded and x.device.type == "cpu" and x.dtype in onednn.SERVED


def _input_shapes(chain: Chain, x: torch.Size, tensors: list[StepTensors]) -> list[torch.Size]:
    """Shape of the input of every convolution, the shortcut's last."""
    shapes = [x]
    for step, own in zip(chain.steps[:-1], tensors, strict=False):
        shapes.append(torch.Size(output_shape(shapes[-1], own.weight.shape, *step.conv.args[:3])))
    return shapes if chain.shortcut is None else [*shapes, x]


def _run(chain: Chain, folded: list[tuple[Tensor, Tensor]], x: Tensor, residual: Tensor | None) -> Tensor:
    """The chain's output from folded weights and shifts."""

    def conv(i: int, h: Tensor, relu: bool, add: Tensor | None = None) -> Tensor:
        args = chain.all_steps[i].conv.args
        return run("conv_add_relu", h, *folded[i], add, *args, relu, backend=chain.backend)

    h, last = x, len(chain.steps) - 1
    for i in range(last):
        h = conv(i, h, relu=True)
    if chain.shortcut is None:
        return conv(last, h, chain.relu, residual)
    out, args = conv(last + 1, x, relu=False), chain.steps[last].conv.args
    run("conv_add_relu_", out, h, *folded[last], *args, chain.relu, backend=chain.backend)
    return out


def runs_as_stock(chain: Chain, x: Tensor) -> bool:
    """Whether no convolution has an epilogue for this input: there is nothing to gain by folding at every call."""
    return chain.backend == "auto" and x.device.type == "cpu" and x.dtype not in onednn.SERVED


class _Recent(NamedTuple):
    """The last answer of :func:`_all_packed` for a chain, and what it was asked for."""

    case: tuple  # settings and shapes
    places: list[tuple | None]  # of the tensors, all dense
    sums: list[int]  # of their content
    kept: list[Packed] | None
    settled: bool  # asked twice, so that every weight is in the layout that oneDNN wants


_recent: weakref.WeakKeyDictionary[nn.Module, _Recent] = weakref.WeakKeyDictionary()  # by the norm of the last step


def _all_packed(chain: Chain, norms: list[nn.Module], x: Tensor, tensors: list[StepTensors]) -> list[Packed] | None:
    """The packed convolutions of a chain; None where one may overflow."""
    flat = [t for own in tensors for t in own[:6] if t is not None]
    case = (x.shape, x.dtype, torch.get_num_threads(), chain.steps, chain.shortcut)
    places = [t if t is None else (*_identity(t), t.shape, t.stride()) for own in tensors for t in own[:6]]
    recent = _recent.get(norms[-1])
    dense = flat
    if recent is None or recent.places != places:
        recent, dense = None, [t if _is_dense(t) else t.contiguous() for t in flat]
    sums = torch.ops.resnet_fused.checksum(dense)
    again = recent is not None and recent.sums == sums and recent.case == case
    if again and recent.settled:
        return recent.kept
    shapes, keys = _input_shapes(chain, x.shape, tensors), _keys(chain.all_steps, tensors, sums)
    kept = [packed(*one, x.dtype) for one in zip(norms, keys, tensors, chain.all_steps, shapes, strict=True)]
    if any(one.enlarges + one.bound == math.inf for one in kept):
        kept = None
    if dense is flat or all(map(operator.is_, dense, flat)):
        _recent[norms[-1]] = _Recent(case, places, sums, kept, again)
    return kept


def _run_packed(chain: Chain, kept: list[Packed], x: Tensor, residual: Tensor | None) -> Tensor:
    """The chain's output from packed weights, by oneDNN."""
    if x.dtype != torch.float32 or torch._C._len_torch_dispatch_stack() or onednn.is_mapped(residual):
        for one in kept:
            bounds.remember(one.shift, one.bound)
        return _run(chain, [one[:2] for one in kept], x, residual)
    steps, last = chain.steps, len(chain.steps) - 1
    h, entering = x, bounds.of(x) if last or chain.relu else bounds.noted(x)
    bound = entering
    for one, step in zip(kept[:last], steps, strict=False):
        bound = bounds.of_sum(one.enlarges, bound, one.bound)
        h = onednn.conv_packed(h, one.weight, one.shift, step.conv, True, bound)
    one, into = kept[last], None
    if chain.shortcut is not None:
        added = bounds.of_sum(kept[-1].enlarges, entering, kept[-1].bound)
        residual = into = onednn.conv_packed(x, kept[-1].weight, kept[-1].shift, chain.shortcut.conv, False, added)
    elif residual is None:
        added = 0.0
    else:
        added = entering if residual is x else bounds.of(residual) if chain.relu else bounds.noted(residual)
    bound = bounds.of_sum(one.enlarges, bound, one.bound, added)
    out = onednn.conv_packed(h, one.weight, one.shift, steps[last].conv, chain.relu, bound, residual, into is not None)
    return bounds.remember(out, bound)


def folded_output(
    chain: Chain,
    norms: list[nn.Module],
    x: Tensor,
    tensors: list[StepTensors],
    residual: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """The chain's output with running statistics and without autograd.

    `norms`: the modules by which folded weights are kept. `dtype`: of the weights and biases as stock would cast them;
    None: as they are.
    """
    if not torch.is_grad_enabled():
        return _folded_output(chain, norms, x, tensors, residual, dtype)
    with torch.no_grad():
        return _folded_output(chain, norms, x, tensors, residual, dtype)


def _folded_output(chain, norms, x, tensors, residual, dtype) -> Tensor:
    if gpu_inference.takes(x):
        return gpu_inference.output(chain, x, [t.cast(dtype) for t in tensors], residual)
    if runs_as_stock(chain, x):
        return stock.chain_output(chain, x, residual, None, [t.cast(dtype) for t in tensors], moves=True)
    given, x = x, channels_last(x)
    residual = x if residual is given else None if residual is None else channels_last(residual)
    steps = chain.all_steps
    if not _can_pack(x, chain.backend) or any((dtype or own.weight.dtype) != x.dtype for own in tensors):
        folded = [
            fold(own, step, x.dtype, dtype or own.weight.dtype, wide=False)
            for own, step in zip(tensors, steps, strict=True)
        ]
        return _run(chain, folded, x, residual)
    kept = _all_packed(chain, norms, x, tensors)
    if kept is None:  # there, folding is not the same
        return stock.chain_output(chain, given, residual, None, [t.cast(dtype) for t in tensors], moves=True)
    with bounds.private():
        return _run_packed(chain, kept, x, residual)
