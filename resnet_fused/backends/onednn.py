"""oneDNN's convolutions with post-ops, as dispatcher ops of their own: one opaque node each for ``torch.compile``.

The weight may be plain or prepacked by :func:`prepack`. oneDNN adds the shift, the residual and the ReLU to the
accumulator, before the only write.
"""

from __future__ import annotations

import functools
import math
import struct

import torch

from ..library import status
from ..ops import OPS, activation
from ..ops.contract import Tensor, channels_last, is_channels_last
from ..ops.conv_add_relu import output_shape
from . import bounds
from .declaration import Kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("conv_add_relu", "conv_add_relu_")
#: Bytes from which glibc maps every allocation anew. oneDNN's result would then fault in 4 KiB at a time (16 ms for
#: 51 MB, measured); a copy of the residual that is added to in place costs a third of that.
_MAPPED = 32 << 20
#: Of oneDNN's description of a layout (dimensions, data type, ...), the bytes that the compiler left between the data
#: type and the next number: they are not initialised.
_PADDING = slice(struct.calcsize("=i4x12qi"), struct.calcsize("=i4x12qi4x"))


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
if _HAS_ONEDNN:
    _pointwise = torch.ops.mkldnn._convolution_pointwise.default
    _pointwise_add = torch.ops.mkldnn._convolution_pointwise.binary
    _pointwise_add_ = torch.ops.mkldnn._convolution_pointwise_.binary


@functools.cache
def missing(dtype: torch.dtype) -> str:
    """Why oneDNN cannot convolve tensors of `dtype` on this machine; empty if it can."""
    if not _HAS_ONEDNN:
        return "this build of torch has no oneDNN"
    asks = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        torch.float64: lambda: False,
    }
    if dtype in asks and not asks[dtype]():
        return f"oneDNN has no fast {str(dtype).removeprefix('torch.')} convolution on this CPU"
    return ""


def prepack(weight: Tensor, input_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups: int = 1) -> Tensor:
    """`weight` in the blocked layout oneDNN prefers for inputs of `input_size`; for :func:`conv_add_relu` only."""
    dense = weight.detach().contiguous()
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
        dense.to_mkldnn(), padding, stride, dilation, groups, list(input_size)
    )
    return bounds.note_packed(packed, dense)


def layout_of(packed: Tensor) -> bytes:
    """The layout of a prepacked weight. Equal for equal layouts; where it is not, a weight is only kept twice."""
    described = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()
    return described[: _PADDING.start] + described[_PADDING.stop :]


def conv_reasons(
    x, weight, shift=None, residual=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False
) -> list[str]:
    """Reasons against :func:`conv_add_relu`."""
    reasons = [] if _HAS_ONEDNN else [missing(x.dtype)]
    if x.numel() == 0 or weight.numel() == 0:
        reasons.append("takes no empty tensors")
    if not all(is_channels_last(t) for t in (x, residual) if t is not None):
        reasons.append("takes channels_last tensors only")
    if weight.dtype != x.dtype:
        reasons.append(f"takes weight and x of one dtype, not {weight.dtype} and {x.dtype}")
    return reasons


def conv_reasons_(residual, x, weight, shift=None, *args, **kwargs) -> list[str]:
    """Reasons against :func:`conv_add_relu_`."""
    return conv_reasons(x, weight, shift, residual, *args, **kwargs)


def conv_add_relu(
    x, weight, shift=None, residual=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False
):
    """See ``ops.conv_add_relu``."""
    if not _has_epilogue(x, residual, groups):
        return _in_steps(x, weight, shift, residual, stride, padding, dilation, groups, relu)
    where = (padding, stride, dilation, groups)
    bias = None if shift is None else shift.to(x.dtype)
    bound = _bound(x, weight, shift, residual, relu)
    act = relu and bound < bounds.SAFE
    op = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        out = op(x, weight, bias, *where, "relu" if act else "none", [], None)
    else:
        _check_residual("conv_add_relu", residual, x, weight, stride, padding, dilation)
        if is_mapped(residual) and (out := _copy(residual)) is not None:
            conv_add_relu_(out, x, weight, shift, stride, padding, dilation, groups, relu)
            return out
        out = op.binary(x, channels_last(residual), weight, bias, *where, "add", 1.0, "relu" if act else None, [], None)
    return _finish(channels_last(out), relu, bound)


def conv_add_relu_(
    residual, x, weight, shift=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False
):
    """See ``ops.conv_add_relu``: the sum lands in `residual`."""
    _check_residual("conv_add_relu_", residual, x, weight, stride, padding, dilation)
    if not _has_epilogue(x, residual, groups):
        residual.copy_(_in_steps(x, weight, shift, residual, stride, padding, dilation, groups, relu))
        bounds.remember(residual, math.inf)
        return
    bias = None if shift is None else shift.to(x.dtype)
    bound = _bound(x, weight, shift, residual, relu)
    act = relu and bound < bounds.SAFE
    target = channels_last(residual)
    out = torch.ops.mkldnn._convolution_pointwise_.binary(
        target, x, weight, bias, padding, stride, dilation, groups, "add", 1.0, "relu" if act else None, [], None
    )
    if out.data_ptr() != residual.data_ptr():
        residual.copy_(out)
    _finish(residual, relu, bound)


def is_mapped(residual: Tensor | None) -> bool:
    """Whether adding to a copy of `residual` in huge pages pays, see :data:`_MAPPED`."""
    return residual is not None and residual.numel() * residual.element_size() >= _MAPPED


def conv_packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv,
    relu: bool,
    bound: float,
    residual: Tensor | None = None,
    in_place: bool = False,
    activated: tuple[int, float] | None = None,
) -> Tensor:
    """:func:`conv_add_relu` for one who has asked all that dispatch asks: float32, channels_last, `weight` packed.

    `bound`: of the result. `in_place`: the sum lands in `residual`, which is returned. `activated`: of a result without
    a sum and a ReLU, by what activation,
    a code and a slope.
    """
    act, where = relu and bound < bounds.SAFE, (conv.padding, conv.stride, conv.dilation, conv.groups)
    if activated is not None:
        carried = activated[0] in _CARRIED or (needs_bound(activated[0]) and bound < bounds.SAFE)
        post_op = _post_op(*activated) if carried else ("none", [], None)
        out = channels_last(_pointwise(x, weight, bias, *where, *post_op))
        return out if carried else activation.value(out, *activated, inplace=True)
    if residual is None:
        out = _pointwise(x, weight, bias, *where, "relu" if act else "none", [], None)
    elif not in_place:
        out = _pointwise_add(x, residual, weight, bias, *where, "add", 1.0, "relu" if act else None, [], None)
    else:
        out = _pointwise_add_(residual, x, weight, bias, *where, "add", 1.0, "relu" if act else None, [], None)
        out = out if out.data_ptr() == residual.data_ptr() else residual.copy_(out)
    out = channels_last(out)
    return torch.relu_(out) if relu and not act else out


#: Activations that oneDNN's epilogue has as exactly as ATen, NaN and infinity included. Not GELU, whose error is 2.5
#: times ATen's and which makes NaN of infinity.
_CARRIED = (activation.SILU, activation.GELU_TANH, activation.LEAKY_RELU, activation.HARDSWISH)


def needs_bound(act: int) -> bool:
    """Whether an activation is in the epilogue where the result is known to be finite: there oneDNN drops NaN."""
    return act == activation.RELU6


def _post_op(act: int, slope: float) -> tuple[str, list[float], str | None]:
    """An activation as ATen's oneDNN convolution is told it: a name, its numbers, and which way to compute it."""
    return {
        activation.SILU: ("swish", [], None),
        activation.GELU_TANH: ("gelu", [], "tanh"),
        activation.LEAKY_RELU: ("leaky_relu", [slope], None),
        activation.HARDSWISH: ("hardswish", [], None),
        activation.RELU6: ("hardtanh", [0.0, 6.0], None),
    }[act]


def _has_epilogue(x: Tensor, residual: Tensor | None, groups: int) -> bool:
    """Whether oneDNN runs the case as one.

    Not in 16 bits with a residual to grouped convolutions, or where images of one pixel or one channel leave open
    whether they are channels_last: ATen adds it by itself there, rounds twice, and with a ReLU has no kernel for it.
    """
    if x.dtype not in SERVED:
        return False
    if residual is None or x.element_size() > 2:
        return True
    return groups == 1 and x.shape[1] > 1 and (1, 1) not in (tuple(x.shape[2:]), tuple(residual.shape[2:]))


def _in_steps(x, weight, shift, residual, stride, padding, dilation, groups, relu) -> Tensor:
    """The case in ATen's operations, in float32 or float64, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if residual is not None:
        _check_residual("conv_add_relu", residual, x, weight, stride, padding, dilation)
    weight = (weight if weight.layout == torch.strided else weight.to_dense()).to(wide)
    bias = None if shift is None else shift.to(wide)
    y = torch.ops.aten.convolution(x.to(wide), weight, bias, stride, padding, dilation, False, [0, 0], groups)
    y = y if residual is None else y.add_(residual)
    return channels_last((torch.relu_(y) if relu else y).to(x.dtype))


def _copy(residual: Tensor) -> Tensor | None:
    """A copy in huge pages, or None without the compiled library; see :data:`_MAPPED`."""
    if not status().cpu.loaded or residual.dtype not in DTYPES:
        return None
    one = torch.ones(residual.shape[1])
    out, _ = torch.ops.resnet_fused.norm_add_relu(channels_last(residual), one, torch.zeros_like(one), relu=False)
    if bounds.is_known(residual):
        bounds.remember(out, bounds.of(residual))
    return out


def _bound(x, weight, shift, residual, relu: bool) -> float:
    """A bound of the result: measured where a ReLU depends on it, else only if it comes for free."""
    if relu or (bounds.is_known(x) and bounds.is_known(residual)):
        return bounds.of_result(x, weight, shift, residual)
    return math.inf


def _finish(out: Tensor, relu: bool, bound: float) -> Tensor:
    """Clamp `out` where the epilogue could not be trusted to, and note its bound, in place of any old one."""
    if relu and not bound < bounds.SAFE:
        torch.relu_(out)
    return bounds.remember(out, bound)


def _check_residual(op, residual, x, weight, stride, padding, dilation) -> None:
    expected = output_shape(x.shape, weight.shape, stride, padding, dilation)
    if tuple(residual.shape) != expected:
        raise RuntimeError(
            f"{op}: residual has shape {list(residual.shape)} but the convolution's result has {list(expected)}; "
            "pass a residual of that shape"
        )


def _register() -> dict[str, Kernel]:
    library = torch.library.Library("resnet_fused", "FRAGMENT")
    reasons = {"conv_add_relu": conv_reasons, "conv_add_relu_": conv_reasons_}
    for name in NAMES:
        library.define(name + OPS[name].schema)
        for key in ("CPU", "MkldnnCPU"):  # the latter where the weight is prepacked
            library.impl(name, globals()[name], key)
        torch.library.register_fake(f"resnet_fused::{name}", OPS[name].fake, lib=library)
    _register.library = library  # dropping it would drop the registrations
    runs = {name: getattr(torch.ops.resnet_fused, name).default for name in NAMES}
    return {name: Kernel(runs[name], DTYPES, reasons[name]) for name in NAMES}


KERNELS = _register()

#: Dtypes that oneDNN convolves well on this machine; asked once, since a compiled graph cannot ask.
SERVED = frozenset(dtype for dtype in DTYPES if not missing(dtype))
