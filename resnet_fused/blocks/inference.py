"""Inference: batch norm folded into the convolutions, activation and residual in their epilogues.

The folded weights are kept between calls. They are made again when a tensor they came from was replaced or written to:
its version counter moved, or, for writes that bypass the counter (``p.data.mul_()``), its content's checksum
changed. The checksum reads all weights once; folding anew on every call would write them twice as well.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import nn

from .. import library
from ..backends import bounds, onednn, run
from ..ops.conv_add_relu import output_shape
from ..steps import Chain, Step, StepTensors
from ..steps.batch_norm import running_affine
from ..steps.conv import channels_last
from ..steps.folded_join import Folded, scaled, shift_of
from . import gpu_inference

Tensor = torch.Tensor


class Packed(NamedTuple):
    """A convolution with its batch norm folded in, and what it was made from."""

    weight: Tensor  # in the layout the backend packed it to
    shift: Tensor  # [K]
    key: tuple


#: Of each convolution, one for each of the last few input shapes: the layout oneDNN prefers depends on them.
_packed: weakref.WeakKeyDictionary[nn.Module, dict[torch.Size, Packed]] = weakref.WeakKeyDictionary()
_SHAPES = 3


def fold(tensors: StepTensors, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and shift of ``bn(conv(x))`` with running statistics."""
    folded = Folded(running_affine(tensors, step.norm, dtype), None)
    return scaled(tensors.weight, folded.bn.scale), shift_of(folded, tensors)


def _key(tensors: StepTensors, step: Step, dtype: torch.dtype) -> tuple:
    sources = [t for t in tensors[:6] if t is not None]
    identity = tuple((id(t), -1 if t.is_inference() else t._version, t.data_ptr(), t.dtype) for t in sources)
    dense = [t if _is_dense(t) else t.contiguous() for t in sources]
    return identity, torch.ops.resnet_fused.checksum(dense), dtype, step


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def packed(conv: nn.Module, tensors: StepTensors, step: Step, shape: torch.Size, dtype: torch.dtype) -> Packed:
    """The folded and prepacked convolution of `conv` for inputs of `shape`, from an earlier call or made now."""
    key, shapes = _key(tensors, step, dtype), _packed.setdefault(conv, {})
    known = shapes.get(shape)
    if known is None or known.key != key:
        if known is None and len(shapes) == _SHAPES:
            shapes.pop(next(iter(shapes)))
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve in any mode
            weight, shift = fold(tensors, step, dtype)
            known = shapes[shape] = Packed(onednn.prepack(weight, shape, *step.conv.args), shift, key)
    return known


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


@torch.no_grad()
def folded_output(
    chain: Chain,
    pairs: tuple[tuple[nn.Module, nn.Module], ...],
    x: Tensor,
    tensors: list[StepTensors],
    residual: Tensor | None,
) -> Tensor:
    """The chain's output with running statistics and without autograd."""
    if gpu_inference.takes(x):
        return gpu_inference.output(chain, x, tensors, residual)
    given, x = x, channels_last(x)
    residual = x if residual is given else None if residual is None else channels_last(residual)
    steps = chain.all_steps
    if not _can_pack(x, chain.backend):
        return _run(chain, [fold(own, step, x.dtype) for own, step in zip(tensors, steps, strict=True)], x, residual)
    folded = []
    for (conv, _), own, step, shape in zip(pairs, tensors, steps, _input_shapes(chain, x.shape, tensors), strict=True):
        folded.append(packed(conv, own, step, shape, x.dtype)[:2])
    with bounds.private():
        return _run(chain, folded, x, residual)
