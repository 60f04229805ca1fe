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
from ..backends import onednn, run
from ..steps import Chain, Step, StepTensors
from ..steps.batch_norm import running_affine
from ..steps.conv import channels_last
from ..steps.folded_join import Folded, scaled, shift_of

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


def _key(tensors: StepTensors, step: Step, x: Tensor) -> tuple:
    sources = [t for t in tensors[:6] if t is not None]
    identity = tuple((id(t), t._version, t.data_ptr(), t.dtype) for t in sources)
    dense = [t if _is_dense(t) else t.contiguous() for t in sources]
    return identity, torch.ops.resnet_fused.checksum(dense), x.dtype, step


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def packed(conv: nn.Module, tensors: StepTensors, step: Step, x: Tensor) -> Packed:
    """The folded and prepacked convolution of `conv` for inputs like `x`, from the last call or made now."""
    key = _key(tensors, step, x)
    shapes = _packed.setdefault(conv, {})
    known = shapes.get(x.shape)
    if known is None or known.key != key:
        if known is not None or len(shapes) == _SHAPES:
            shapes.pop(x.shape if known is not None else next(iter(shapes)))
        weight, shift = fold(tensors, step, x.dtype)
        known = Packed(onednn.prepack(weight, x.shape, *step.conv.args), shift, key)
        shapes[x.shape] = known
    return known


def _can_pack(x: Tensor, backend: str) -> bool:
    """Whether prepacked weights may be kept: outside of any tracing, where the CPU backend would run the case."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or backend not in ("auto", "cpu"):
        return False
    return library.status().cpu.loaded and x.device.type == "cpu" and x.dtype in onednn.SERVED


@torch.no_grad()
def folded_output(
    chain: Chain,
    pairs: tuple[tuple[nn.Module, nn.Module], ...],
    x: Tensor,
    tensors: list[StepTensors],
    residual: Tensor | None,
) -> Tensor:
    """The chain's output with running statistics and without autograd."""
    x = channels_last(x)
    keep = _can_pack(x, chain.backend)

    def conv(i: int, h: Tensor, relu: bool, add: Tensor | None = None, inplace: bool = False) -> Tensor:
        step, own = chain.all_steps[i], tensors[i]
        if keep:
            weight, shift, _ = packed(pairs[i][0], own, step, h)
        else:
            weight, shift = fold(own, step, h.dtype)
        if inplace:
            run("conv_add_relu_", add, h, weight, shift, *step.conv.args, relu, backend=chain.backend)
            return add
        return run("conv_add_relu", h, weight, shift, add, *step.conv.args, relu, backend=chain.backend)

    h, last = x, len(chain.steps) - 1
    for i in range(last):
        h = conv(i, h, relu=True)
    if chain.shortcut is not None:
        return conv(last, h, chain.relu, conv(last + 1, x, relu=False), inplace=True)
    return conv(last, h, chain.relu, None if residual is None else channels_last(residual))
