"""What evaluation makes of parameters: batch norm in the convolution before it, or as a scale and a shift; kept packed.

Folded weights are kept between calls, packed as oneDNN wants them or transformed for minimal filtering. They are made
again when a tensor they came from was replaced or written to: its version counter moved, or, for writes that bypass the
counter (``p.data.mul_()``), its content's checksum changed. The checksum reads all weights once, as fast as memory
gives them.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends import bounds, onednn
from . import winograd
from .batch_norm import running_affine
from .program import Call, Convolution
from .spec import StepTensors


class Part(NamedTuple):
    """A convolution, the norm that alone reads it, or both, by the values that they make; else a norm by itself."""

    conv: int | None = None
    norm: int | None = None


class Folded(NamedTuple):
    """A part as it is used."""

    weight: Tensor  # of the convolution, in the layout `layout`; of a norm by itself, its scale, [K]
    shift: Tensor | None  # [K]
    bound: float = 0.0  # of the shift; see `bounds.of`
    enlarges: float = 0.0  # see `bounds.of_weight`
    layout: bytes = b""
    scale: Tensor | None = None  # in a weight that :mod:`.winograd` transformed


class Kept(NamedTuple):
    """What is kept of a part. Never changed but replaced as a whole: threads may meet in it."""

    key: tuple  # what it was made from
    packed: dict[torch.dtype, tuple[Folded, ...]]  # of each dtype at most LAYOUTS, the newest last


#: oneDNN was seen to want up to three layouts of one weight over all image and batch sizes, and up to two from 4 pixels
#: a side on. With more, the oldest goes: memory is bounded by so many weights for each dtype that was asked for.
LAYOUTS = 3
#: By the last module of a part, its norm if it has one: a convolution may be followed by different ones.
_kept: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class _Layouts(dict):
    """Which layout oneDNN wants for a convolution, by its geometry and its input's shape: found by packing a weight.

    At the first sight of a shape nothing is known, and a weight packed for another shape serves: oneDNN reorders it if
    it must, as it does stock's weights at every call. Only a shape that comes back is worth packing for.
    """

    LIMIT = 4096  # some ten image sizes of twenty networks; about 1 KB each

    def look(self, case: tuple) -> tuple[bool, bytes | None]:
        """Whether `case` was seen before, and its layout if that is known."""
        with _lock:
            known = case in self
            self[case] = self.pop(case, None)  # those used last come last
            if len(self) > self.LIMIT:
                del self[next(iter(self))]
            return known, self[case]


_layouts = _Layouts()


def fold(call: Call, part: Part, to: torch.dtype | None, wide: bool = False) -> tuple[Tensor, Tensor | None]:
    """Weight (scale, of a norm by itself) and shift of `part`, for activations of the call's dtype.

    `to`: the weight's dtype, to which it is rounded once; None: its own. `wide`: fold in float64, where the result is
    kept.
    """
    program, first = call.program, call.program.inputs
    conv = None if part.conv is None else call.tensors[part.conv - first]
    if part.norm is None:
        conv = conv.cast(to)
        return conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    norm, like = call.tensors[part.norm - first], torch.float64 if wide else call.x.dtype
    bn = running_affine(norm, program.maker(part.norm).norm, like)
    weight, shift = bn.scale, bn.shift
    if conv is not None:
        weight = (conv.weight.to(bn.scale.dtype) * bn.scale.view(-1, 1, 1, 1)).to(to or conv.weight.dtype)
        if conv.bias is not None:
            shift = torch.addcmul(shift, bn.scale, conv.bias.to(bn.scale.dtype))
    elif wide:
        weight = weight.to(torch.float32)
    return weight, shift.to(torch.float32) if wide else shift


def packed(
    module: nn.Module, call: Call, part: Part, key: tuple, shape: torch.Size, outputs: int | None = None
) -> Folded:
    """`part` folded and packed for inputs of `shape`, kept or made now. `module`: by which it is kept.

    `outputs`: of a tile, where the weight is to be transformed for filtering.
    """
    dtype, case, seen, layout = call.x.dtype, None, True, b""
    own = StepTensors(None) if part.conv is None else call.tensors[part.conv - call.program.inputs]
    if outputs is not None:
        layout = winograd.layout(outputs, call.program.maker(part.conv).conv)
    elif part.conv is not None:
        node: Convolution = call.program.maker(part.conv)
        case = (dtype, own.weight.shape, node.conv, shape, torch.get_num_threads())
        seen, layout = _layouts.look(case)
    with _lock:
        kept = _kept.get(module)
    there = kept.packed.get(dtype, ()) if kept is not None and kept.key == key else ()
    for one in reversed(there):
        if one.layout == layout or not (seen or winograd.is_layout(one.layout)):
            return one
    with torch.inference_mode(False), torch.no_grad():  # what is kept must serve in any mode
        weight, shift = fold(call, part, dtype, wide=True)
        limit = 0.0 if shift is None else bounds.of(shift)
        if outputs is not None:
            scale = None
            if part.norm is not None:
                norm, settings = call.tensors[part.norm - call.program.inputs], call.program.maker(part.norm).norm
                scale = running_affine(norm, settings, torch.float64).scale.to(torch.float32)
            stride = call.program.maker(part.conv).conv.stride[0]
            transformed = torch.ops.resnet_fused.winograd_weight3x3(own.weight.detach(), scale, outputs, stride)
            made = Folded(transformed, shift, limit, bounds.of_weight(weight), layout, scale)
        elif case is None:
            made = Folded(weight, shift, limit, bounds.of_weight(weight.unsqueeze(1)))
        else:
            weight = onednn.prepack(weight, shape, *node.conv.args)
            made = Folded(weight, shift, limit, bounds.of_weight(weight), onednn.layout_of(weight))
            with _lock:
                _layouts[case] = made.layout
    return _keep(module, key, dtype, made)


def _keep(module: nn.Module, key: tuple, dtype: torch.dtype, made: Folded) -> Folded:
    """Keep `made`, or return what is kept in its layout already."""
    with _lock:
        kept = _kept.get(module)
        others = kept.packed if kept is not None and kept.key == key else {}
        there = others.get(dtype, ())
        for one in there:
            if one.layout == made.layout:
                return one
        _kept[module] = Kept(key, {**others, dtype: (*there, made)[-LAYOUTS:]})
    return made
