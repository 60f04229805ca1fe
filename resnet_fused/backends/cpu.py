"""The CPU backend: compiled loops of the first library, and oneDNN's convolutions with post-ops."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..library import CPU_OPS, status
from ..ops import OPS, conv_chain, lazy_grad_apply, norm_relu_coefficients
from ..ops.contract import is_channels_last, is_slice, takes_arguments_of
from . import dense, onednn
from .declaration import Backend, Kernel, check_complete

LOOP_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VECTOR_DTYPES = (torch.float32, torch.float64)


def loop_reasons(*args, **kwargs) -> list[str]:
    """Reasons against the compiled loops: they must be built, and walk rows of channels."""
    if not status().cpu.loaded:
        return [f"the compiled library is {status().cpu.reason}"]
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() == 4]
    return [] if all(map(is_channels_last, tensors)) else ["takes channels_last tensors only"]


@takes_arguments_of(lazy_grad_apply.reference)
def lazy_apply_reasons(t) -> list[str]:
    """As :func:`loop_reasons`; the loops multiply by `a`, and take no bits."""
    reasons = loop_reasons(t.g, t.z, t.residual)
    return reasons if t.a is not None and t.mask is None else [*reasons, "takes no mask, and no call without a"]


def weight_grad_reasons(grad, x, weight, *args, **kwargs) -> list[str]:
    """As :func:`loop_reasons` for the activations; the weight may be in any layout."""
    return loop_reasons(grad, x)


def averaged_reasons(*args, **kwargs) -> list[str]:
    """As :func:`loop_reasons`, but what is averaged, the last activation, may be channels of a channels_last tensor."""
    *gradient, x = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() == 4]
    reasons = loop_reasons(*gradient)
    return reasons if is_slice(x) else [*reasons, "takes channels of a channels_last tensor only"]


def winograd_reasons(x, weight, padding=1, *args, **kwargs) -> list[str]:
    """As :func:`loop_reasons` for the activations; the weight may be in any layout, but is 3x3 and of their dtype."""
    reasons = loop_reasons(x)
    if padding not in (0, 1):
        reasons.append(f"takes a padding of 0 or 1, not {padding}")
    if tuple(weight.shape[2:]) != (3, 3):
        reasons.append(f"takes 3x3 weights, not {'x'.join(map(str, weight.shape[2:]))}")
    if weight.dtype != x.dtype:
        reasons.append("takes a weight of the activations' dtype")
    return reasons


def grouped_reasons(x, weight, stride=1, *args, **kwargs) -> list[str]:
    """As :func:`winograd_reasons`; groups have as many outputs as inputs."""
    reasons = winograd_reasons(x, weight)
    if stride not in (1, 2):
        reasons.append(f"takes a stride of 1 or 2, not {stride}")
    if weight.shape[0] != x.shape[1]:
        reasons.append("takes groups of as many outputs as inputs")
    return reasons


def grouped_grad_reasons(grad, x, weight, stride=1) -> list[str]:
    """As :func:`grouped_reasons`, of two activations."""
    return loop_reasons(grad) + grouped_reasons(x, weight, stride)


def winograd_weight_reasons(weight, scale=None, *args, **kwargs) -> list[str]:
    """The weight may be in any layout, the scale must be a dense vector."""
    reasons = loop_reasons()
    if tuple(weight.shape[2:]) != (3, 3):
        reasons.append(f"takes 3x3 weights, not {'x'.join(map(str, weight.shape[2:]))}")
    if scale is not None and not (scale.is_contiguous() and scale.dtype == weight.dtype):
        reasons.append("takes contiguous vectors of the weight's dtype only")
    return reasons


def winograd_packed_reasons(
    x, weight, packed, scale=None, shift=None, residual=None, padding=1, relu=False, stride=1
) -> list[str]:
    """As :func:`winograd_reasons`; the transformed weight is dense, and so are vectors."""
    reasons = winograd_reasons(x, weight, padding) + (loop_reasons(residual) if residual is not None else [])
    if stride not in (1, 2):
        reasons.append(f"takes a stride of 1 or 2, not {stride}")
    if stride == 2 and x.shape[1] % 16:
        reasons.append("takes a multiple of 16 channels with a stride of 2")
    vectors = [t for t in (scale, shift) if t is not None]
    if not all(t.is_contiguous() and t.dtype == x.dtype for t in (packed, *vectors)):
        reasons.append("takes a contiguous transformed weight and vectors of the activations' dtype only")
    return reasons


def unfolded_reasons(x, weight, *args, residual=None, **kwargs) -> list[str]:
    """As :func:`loop_reasons` for the activations; the weight may be contiguous too, and vectors must be."""
    tensors = [t for t in (*args, *kwargs.values(), residual) if isinstance(t, torch.Tensor)]
    reasons = loop_reasons(x, *tensors)
    lie_dense = weight.is_contiguous() or is_channels_last(weight)
    if not lie_dense or not all(t.is_contiguous() for t in tensors if t.dim() == 1):
        reasons.append("takes a dense weight and contiguous vectors only")
    return reasons if all(t.dtype == x.dtype for t in (weight, *tensors)) else [*reasons, "takes one dtype only"]


def chain_reasons(*args, **kwargs) -> list[str]:
    """As :func:`unfolded_reasons`, of each convolution."""
    each = conv_chain.convolutions(*args, **kwargs)
    return [*dict.fromkeys(reason for given in each for reason in unfolded_reasons(*given))]


def stem_reasons(x, weight, *args, **kwargs) -> list[str]:
    """As :func:`loop_reasons` for the activations; the weight may be in any layout, but is of their dtype."""
    vectors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    reasons = loop_reasons(x)
    if not all(t.is_contiguous() and t.dtype == x.dtype for t in vectors) or weight.dtype != x.dtype:
        reasons.append("takes a weight, and contiguous vectors, of the activations' dtype only")
    return reasons


def stem_grad_reasons(grad, x, weight, *args, **kwargs) -> list[str]:
    """As :func:`stem_reasons`, of two activations."""
    return loop_reasons(grad) + stem_reasons(x, weight)


def stem_pool_reasons(grad_out, index, z, a, b, d, scale, shift, x, weight, *args, **kwargs) -> list[str]:
    """As :func:`stem_reasons`, of all activations."""
    return loop_reasons(grad_out, index, z) + stem_reasons(x, weight, a, b, d, scale, shift)


def unfolded_reasons_(out, x, weight, *args, **kwargs) -> list[str]:
    """As :func:`unfolded_reasons`, and for what is written."""
    reasons = unfolded_reasons(x, weight, *args, **kwargs)
    if not is_channels_last(out) or out.dtype != x.dtype:
        reasons.append("takes a channels_last tensor of x's dtype for the result only")
    return reasons


def vector_reasons(*args, **kwargs) -> list[str]:
    """Reasons against the loops over channels: vectors of one dtype, with none between their elements."""
    if not status().cpu.loaded:
        return [f"the compiled library is {status().cpu.reason}"]
    vectors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() == 1]
    fit = all(t.dtype == args[0].dtype and t.is_contiguous() for t in vectors)
    return [] if fit else ["takes contiguous vectors of one dtype only"]


def matrix_reasons(weight: torch.Tensor, *args, **kwargs) -> list[str]:
    """Reasons against the products of a weight's rows: they need AVX2 to be worth it, and contiguous tensors.

    Of `a`, the only other tensor of four dimensions, the kernels read the shape alone.
    """
    library = status()
    if not library.cpu.loaded:
        return [f"the compiled library is {library.cpu.reason}"]
    if library.build_info["cpu_level"] == "baseline":
        return ["is slower than BLAS without AVX2"]
    small = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() < 4]
    fit = (weight.dim() != 4 or is_channels_last(weight)) and all(t.is_contiguous() for t in small)
    return [] if fit else ["takes contiguous tensors only"]


def _compiled(name: str) -> Callable:
    """The op of the compiled library, looked up at the first call: nothing is loaded before that."""

    def run(*args, **kwargs):
        return getattr(torch.ops.resnet_fused, name).default(*args, **kwargs)

    run.__name__ = name
    return run


#: Kernels that walk something else than rows of channels, and what may stand against that.
_OTHERS = {
    "lazy_grad_apply": lazy_apply_reasons,
    "lazy_grad_apply_": lazy_apply_reasons,
    "conv_norm_add_relu": unfolded_reasons,
    "conv_norm_add_relu_": unfolded_reasons_,
    "conv_chain": chain_reasons,
    "conv_norm_relu_pool": stem_reasons,
    "conv_weight_grad": weight_grad_reasons,
    "grouped_conv3x3": grouped_reasons,
    "grouped_conv3x3_wgrad": grouped_grad_reasons,
    "norm_relu_avg_pool": averaged_reasons,
    "norm_relu_avg_pool_apply": averaged_reasons,
    "norm_relu_avg_pool_backward": averaged_reasons,
    "gram_norm": matrix_reasons,
    "gram_grad": matrix_reasons,
    "stem_conv": stem_reasons,
    "stem_conv_wgrad": stem_grad_reasons,
    "stem_pool_wgrad": stem_pool_reasons,
    "winograd_conv3x3": winograd_reasons,
    "winograd_conv3x3_add_relu": winograd_packed_reasons,
    "winograd_conv3x3_wgrad": weight_grad_reasons,
    "winograd_weight3x3": winograd_weight_reasons,
    **dense.REASONS,
}
#: Kernels that do not take every dtype of the loops.
_FLOAT32 = ("winograd_", "grouped_", "conv1x1", "stem_", "conv_norm_relu_pool", "dense_")
_DTYPES = {name: (torch.float32,) for name in CPU_OPS if name.startswith(_FLOAT32)}
#: Nothing rounds to 16 bits.
_DTYPES |= dict.fromkeys(("conv_norm_add_relu", "conv_norm_add_relu_", "conv_chain"), VECTOR_DTYPES)


def _declared(name: str) -> Kernel:
    """The kernel of the compiled library."""
    if OPS[name].vectors:
        return Kernel(_compiled(name), VECTOR_DTYPES, vector_reasons)
    return Kernel(_compiled(name), _DTYPES.get(name, LOOP_DTYPES), _OTHERS.get(name, loop_reasons))


#: Ops that are two of the compiled ones, one after the other: on a CPU it is the pass over memory that counts.
_TWO = {
    "norm_relu_coefficients": Kernel(
        norm_relu_coefficients.in_two(_compiled("norm_add_relu_backward"), _compiled("bn_coefficients")),
        LOOP_DTYPES,
        loop_reasons,
    )
}

BACKEND = check_complete(
    Backend(
        name="cpu",
        devices=("cpu",),
        kernels={**{name: _declared(name) for name in CPU_OPS}, **_TWO, **onednn.KERNELS},
    )
)
