"""What an op promises, whoever runs it.

An :class:`Op` bundles the parts that every other room reads: the schema (the same string that C++ registers), the
reference, the fake kernel, the bytes and FLOPs the op cannot avoid, and every other fact of it that a room asks for.
Backends run it, ``explain`` and the plan count with it, and one contract test checks every backend against it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable

import torch

Tensor = torch.Tensor

#: Activation dtypes that every kernel of this package takes.
DATA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def one_launch(results: list[Tensor]) -> int:
    """Of a kernel that leaves nothing to be added up."""
    return 1


def two_launches(results: list[Tensor]) -> int:
    """Of a kernel that sums over all pixels: partial sums, and a second launch that adds them."""
    return 2


def one_more_for_sums(results: list[Tensor]) -> int:
    """Of a kernel whose results after the first are such sums, empty where nobody asked for them."""
    return 2 if len(results) > 1 else 1


def one_more_for_statistics(results: list[Tensor]) -> int:
    """Of a kernel whose results are such sums alone, empty where nobody asked for them; its data goes elsewhere."""
    return 2 if results else 1


def none_in_full(*args, **kwargs) -> int:
    """Of an op that multiplies its data as it comes."""
    return 0


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation: its name, schema, meaning and cost."""

    name: str
    schema: str  # arguments and results, as in ``torch.library.define``
    reference: Callable  # plain differentiable PyTorch, any dtype, any device
    fake: Callable  # shapes, dtypes and strides only
    bytes: Callable  # same arguments -> int, the memory traffic in bytes that the op must cause
    flops: Callable  # same arguments -> int
    small: bool = False  # arithmetic per channel: a backend without a kernel for it leaves it to the others
    compiled: bool = False  # csrc/ops.cpp has its schema, csrc/cpu a kernel unless `on_cpu` says otherwise
    on_cpu: bool = True  # of a compiled op: whether csrc/cpu has a kernel, not csrc/cuda alone
    vectors: bool = False  # the first argument is a vector in the dtype of statistics, instead of activations
    #: What tells a call of other sizes from this one, as :mod:`..backends.selfcheck.problems` reads it; "": a kernel of
    #: it may not come in many binaries, each of which is judged by itself.
    forms: str = ""
    launches: Callable = one_launch  # the results that are not empty -> kernels that a GPU starts for them
    #: Same arguments -> those of the FLOPs that are in full float32, whatever the data: digits cancel.
    full_flops: Callable = none_in_full
    sums_of_rounded: bool = False  # its sums are of values rounded to the activations' dtype first, see :mod:`.lazy`
    ulps: int = 1  # units in the last place by which a rounded activation may differ from the exact one
    #: Same arguments -> the calls of other ops, name and arguments, as which it is counted; None: it is one itself.
    parts: Callable | None = None

    def __repr__(self) -> str:
        return f"Op({self.name})"

    @functools.cached_property
    def results(self) -> tuple[str, ...]:
        """Names of what it returns."""
        return tuple(result.name for result in torch._C.parse_schema(self.name + self.schema).returns)

    @functools.cached_property
    def written(self) -> tuple[int, ...]:
        """Positions of the arguments that it writes."""
        arguments = torch._C.parse_schema(self.name + self.schema).arguments
        return tuple(i for i, argument in enumerate(arguments) if argument.is_write)


#: Every op by name; filled by the modules of this package.
OPS: dict[str, Op] = {}


def define(name: str, schema: str, **parts: Callable | bool | int | str) -> Op:
    """Make an :class:`Op` and enter it in :data:`OPS`."""
    OPS[name] = Op(name, schema, **parts)
    return OPS[name]


def define_in_place(op: Op) -> Op:
    """The op of its name with a ``_`` behind: it writes what `op` makes into the first argument, its caller's own."""
    arguments = op.schema.partition(" -> ")[0]

    def reference(first: Tensor, *args, **kwargs) -> None:
        first.copy_(op.reference(first, *args, **kwargs))

    def fake(first: Tensor, *args, **kwargs) -> None:
        return None

    parts = {"bytes": op.bytes, "flops": op.flops, "compiled": op.compiled}
    schema = arguments.replace("(Tensor ", "(Tensor(a!) ", 1) + " -> ()"
    return define(f"{op.name}_", schema, reference=reference, fake=fake, **parts)


def takes_arguments_of(reference: Callable) -> Callable[[Callable], Callable]:
    """Decorator: a function of one namespace becomes a function of the arguments of `reference`, defaults included.

    So that a long signature is spelled once.
    """
    signature = inspect.signature(reference)

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def bound(*args, **kwargs):
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            return function(types.SimpleNamespace(**call.arguments))

        return bound

    return decorate


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of per-channel vectors for activations of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(vector: Tensor) -> Tensor:
    """A ``[C]`` vector shaped to broadcast over ``[N, C, H, W]``."""
    return vector.view(1, -1, 1, 1)


def per_sample(vector: Tensor) -> Tensor:
    """An ``[N]`` vector shaped to broadcast over ``[N, C, H, W]``."""
    return vector.view(-1, 1, 1, 1)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of all tensors given, None counting nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def channels_last_strides(shape) -> tuple[int, int, int, int]:
    """Strides of the row-major matrix ``[N*H*W, C]`` seen as ``[N, C, H, W]``."""
    _, c, h, w = shape
    return h * w * c, 1, w * c, c


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` lies in memory as ``[N*H*W, C]``; strides of dimensions of size 1 say nothing."""
    return x.numel() == 0 or x.is_contiguous(memory_format=torch.channels_last)


def is_slice(x: Tensor) -> bool:
    """Whether `x` is some channels of a tensor in channels_last, or all: its pixels lie evenly, as far apart as may be.

    Strides of dimensions of size 1 say nothing here either.
    """
    n, c, h, w = x.shape
    if x.numel() == 0:
        return True
    steps = [(size, x.stride(dim), pixels) for dim, size, pixels in ((3, w, 1), (2, h, w), (0, n, h * w))]
    pitches = {stride / pixels for size, stride, pixels in steps if size > 1}
    return (c == 1 or x.stride(1) == 1) and len(pitches) <= 1 and all(pitch >= c for pitch in pitches)


def pitch(x: Tensor) -> int:
    """Elements from a pixel of a slice (:func:`is_slice`) to the next; of a single one, its channels."""
    n, c, h, w = x.shape
    steps = ((w, x.stride(3)), (h, x.stride(2) // max(w, 1)), (n, x.stride(0) // max(h * w, 1)))
    return next((step for size, step in steps if size > 1), c)


def channels_last(x: Tensor) -> Tensor:
    """`x` with exact channels_last strides, also where a dimension of size 1 allows others; differentiable."""
    x = x.contiguous(memory_format=torch.channels_last)
    strides = channels_last_strides(x.shape)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def channels_last_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last tensor of the shape of `x`, exact strides also for ambiguous shapes."""
    return x.new_empty_strided(x.shape, channels_last_strides(x.shape), dtype=dtype or x.dtype)


def mask_shape(x: Tensor) -> tuple[int, int]:
    """Shape of the packed sign mask of `x`: one row of ``ceil(C / 8)`` bytes per pixel."""
    n, c, h, w = x.shape
    return n * h * w, (c + 7) // 8


def pack_mask(keep: Tensor) -> Tensor:
    """Pack a boolean ``[N, C, H, W]`` tensor into ``[N*H*W, ceil(C/8)]`` uint8; channel c is bit ``c % 8``."""
    n, c, h, w = keep.shape
    rows = keep.permute(0, 2, 3, 1).reshape(n * h * w, c)
    rows = torch.nn.functional.pad(rows.to(torch.uint8), (0, -c % 8)).view(n * h * w, (c + 7) // 8, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    return (rows * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Inverse of :func:`pack_mask`: a boolean tensor of the shape of `like`."""
    n, c, h, w = like.shape
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, :c].bool().view(n, h, w, c).permute(0, 3, 1, 2)


def keep_from(mask: Tensor, like: Tensor) -> Tensor:
    """Where a gradient passes a ReLU, from its output or from its packed sign bits.

    Stock's rule is ``not (out <= 0)``: a NaN output lets the gradient through.
    """
    return unpack_mask(mask, like) if mask.dtype == torch.uint8 else ~(mask <= 0)
