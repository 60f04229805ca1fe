"""Which launches of the Triton ops script_compile.py compiles, and for which GPUs."""

import functools
import importlib
import os

import torch
from layer_calls import (
    Layer,
    act_calls,
    average_calls,
    backward_calls,
    calls,
    dense_calls,
    forward_calls,
    gate_calls,
    narrow_calls,
    pool_calls,
    small_calls,
)

from resnet_fused.backends import cards
from resnet_fused.backends import triton as room
from resnet_fused.backends.triton import bn_stats, lazy_grad_apply, norm_add_relu, norm_add_relu_backward, trace
from resnet_fused.plan.choose import setting

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ARCHS = tuple(map(int, os.environ.get("TRITON_ARCHS", "80 90 100 120").split()))
#: `TRITON_LAUNCHES=all`, of `make budgets`: every one, though its code differs from another's in sizes alone, in a
#: dtype's conversions, or in the assembler. `oldest`: what tells whether an older compiler takes all that there is.
ALL, OLDEST = (os.environ.get("TRITON_LAUNCHES") == word for word in ("all", "oldest"))
NARROW = ((64, 56, 64, 256), (64, 28, 128, 512), (64, 56, 128, 256))  # ResNet-50's, ResNeXt-50's
MANY = 2**20  # samples, so that rows are counted beyond 2^31


def tensors(dtype, channels, n):
    """Meta tensors of a large layer: z, residual, a [C] vector, an [N] factor, and a packed mask."""
    h, w = 56, 56
    z, r = (torch.empty((n, h, w, channels), dtype=dtype, device="meta").permute(0, 3, 1, 2) for _ in range(2))
    vector, factor = torch.empty(channels, device="meta"), torch.empty(n, device="meta")
    return z, r, vector, factor, torch.empty((n * h * w, (channels + 7) // 8), dtype=torch.uint8, device="meta")


def launches(dtype, channels=256, samples=64):
    """Pixelwise ops: (options, weight, call). Weight 2: a kernel's richest options, 1: common ones, 0: the rest."""
    z, r, v, f, bits = tensors(dtype, channels, samples)
    forward, backward, apply = norm_add_relu.run, norm_add_relu_backward.run, lazy_grad_apply.run
    yield "", 2, lambda: bn_stats.run(z)
    yield "batch norm", 2, lambda: bn_stats.run(z, v, v, 1e-5)
    yield "plain", 0, lambda: forward(z, v, v)
    yield "residual, mask", 1, lambda: forward(z, v, v, r, emit_mask=True)
    yield "affine residual, factor, mask", 2, lambda: forward(z, v, v, r, v, v, f, emit_mask=True)
    yield "residual, no relu", 0, lambda: forward(z, v, v, r, relu=False)
    yield "recompute", 1, lambda: backward(z, r, v, scale=v, shift=v)
    yield "recompute, sums only", 0, lambda: backward(z, r, v, scale=v, shift=v, emit_grad=False)
    yield "bits", 1, lambda: backward(z, r, v, mask=bits)
    yield "output, no z", 0, lambda: backward(z, mask=r)
    yield "bits, residual, factor", 2, lambda: backward(z, r, v, None, None, bits, r, v, f)
    yield "no relu", 0, lambda: backward(z, r, v, relu=False, emit_grad=False)
    yield "frozen", 0, lambda: apply(z, None, v)
    yield "affine", 1, lambda: apply(z, r, v, v, v)
    yield "affine, sign, factor", 0, lambda: apply(z, r, v, v, v, v, v, f)
    yield "affine, sign, factor, residual", 2, lambda: apply(z, r, v, v, v, v, v, f, z)


MAKERS = (pool_calls, average_calls, gate_calls, act_calls, forward_calls, backward_calls, narrow_calls, small_calls)


def products(at, *makers, which=None):
    """Of all other ops: (options, call); `which`: of these options, None: of all."""
    for op, options, args, kwargs in calls(at, *(makers or MAKERS)):
        if which is None or (op, options) in which:
            run = importlib.import_module(f"{room.__name__}.{op}").run
            yield options, functools.partial(run, *args, **kwargs)


#: One or two for each kernel, with nearly all that it can do.
RICHEST = (
    ("conv1x1", "lazy, narrow to wide, batch norm"),
    ("conv1x1_join", "lazy, strided projection, factor, mask"),
    ("conv1x1_join", "lazy, affine residual, factor, mask"),
    ("conv1x1_dgrad", "Gram join: bits, factor, coupling, sums"),
    ("conv1x1_dgrad", "strided projection: bits, coupling"),
    ("conv1x1_dgrad", "lazy gradient, masked residual"),
    ("conv1x1_dgrad", "both gradients, masked residual"),
    ("conv1x1_wgrad", "lazy gradient and input, rounded"),
    ("conv1x1_wgrad", "Gram join: bits, lazy, its matrices"),
    ("conv1x1_dgrad", "no weight: coupling, sums"),
    ("conv1x1_dgrad", "lazy gradient, coefficients"),
    ("conv1x1_backward", "lazy gradient, masked residual"),
    ("conv1x1_backward", "lazy gradient, coupling, residual"),
    ("conv1x1_backward", "Gram join: bits, lazy"),
    ("conv1x1_backward", "plain join: bits, factor, sums"),
    ("gram", "lazy"),
    ("gram", "stride 2"),
    ("gram_norm", "batch norm"),
    ("gram_grad", ""),
    ("gram_grad", "wide input"),
    ("gate_add_relu", "residual"),
    ("gate_add_relu_backward", "output"),
    ("norm_act", "gelu"),
    ("norm_act", "silu"),
    ("norm_act_backward", "gelu"),
    ("norm_act_apply", "gelu"),
    ("norm_relu_pool", ""),
    ("norm_relu_pool_backward", ""),
    ("norm_relu_pool_apply", "affine"),
    ("norm_relu_avg_pool", ""),
    ("norm_relu_avg_pool_backward", ""),
    ("norm_relu_avg_pool_apply", "affine"),
    ("bn_affine", ""),
    ("bn_coefficients", ""),
    ("running_affine", ""),
    ("running_update", "four norms"),
)
#: Of each op the first of those: where nothing but sizes or a dtype is new. The wide input's kernels are others.
FIRST = (*{op: (op, options) for op, options in reversed(RICHEST)}.values(), ("gram_grad", "wide input"))
FIRST_PRODUCTS = tuple(key for key in FIRST if key[0].startswith(("conv1x1", "gram")))
#: Of the richest those beside which another of the same kernel is compiled. "Both gradients" start what the masked
#: residual does, to a register or two; the others have fewer operands than that one and took as many registers at most,
#: but for four more of no weight on sm_120.
LESSER = (
    ("conv1x1_join", "lazy, affine residual, factor, mask"),
    ("conv1x1_dgrad", "strided projection: bits, coupling"),
    ("conv1x1_dgrad", "lazy gradient, masked residual"),
    ("conv1x1_dgrad", "no weight: coupling, sums"),
    ("conv1x1_backward", "lazy gradient, coupling, residual"),
    ("gram", "stride 2"),
    ("norm_act", "silu"),
)
GREATER = RICHEST if ALL else tuple(key for key in RICHEST if key not in LESSER)
#: Of odd layers elsewhere than on sm_90: the products that take most registers there.
ODD_ELSEWHERE = tuple(key for key in FIRST if key[0] in ("conv1x1", "conv1x1_dgrad", "conv1x1_wgrad"))
EVERY = None


def record(call, arch):
    """The launches that `call` would start on a GPU of `arch`."""
    return trace.launches(call, (), {}, cards.Card(arch))


def chosen():
    """What to compile: (options, dtype, channels, architecture, launch)."""
    for options, dtype, channels, arch, call in (*chosen_pixelwise(), *chosen_products(), *chosen_dense()):
        if arch in ARCHS:
            yield from ((options, dtype, channels, arch, launch) for launch in record(call, arch))


def chosen_pixelwise():
    """All options in bfloat16 on sm_90."""
    for dtype in DTYPES:
        for arch in ARCHS:
            least = (dtype is not torch.bfloat16) * (1 + OLDEST) + (arch != 90)
            for options, weight, call in launches(dtype):
                if weight >= least:
                    yield options, dtype, 256, arch, call
    few = ((torch.bfloat16, 24, 64), (torch.float32, 24, 64), (torch.bfloat16, 7, 64), (torch.bfloat16, 8, MANY))
    for dtype, channels, samples in few[2 * OLDEST :]:
        for options, weight, call in launches(dtype, channels, samples):
            if weight == 2:
                yield options, dtype, channels, 90, call


def chosen_products():
    """All options in bfloat16 on sm_90, the richest on odd layers; what repeats least of these elsewhere.

    float32 is compiled as multiplied in TF32, torch's default for convolutions, and in full. Narrow layers' rows are
    counted beyond 2^31 where all other layers' options are the same, as no tile depends on how many there are.
    """
    wide, odd, narrow = (64, 7, 512, 2048), (64, 14, 33, 65), (64, 56, 64, 256)
    others = [arch for arch in ARCHS if arch != 90]
    few, greater = RICHEST if ALL else FIRST_PRODUCTS, FIRST if OLDEST else GREATER
    half = RICHEST if ALL else [key for key in few if key[0] not in ("gram_norm", "gram_grad")]
    layers = [(Layer(*wide), 90, EVERY), (Layer(*wide, DTYPES[1]), 90, half), (Layer(*wide, DTYPES[2]), 90, greater)]
    layers += [(Layer(*wide), arch, GREATER) for arch in others]
    layers += [(Layer(*odd), 90, few if OLDEST else RICHEST)]
    layers += [(Layer(*odd), arch, RICHEST if ALL else ODD_ELSEWHERE) for arch in others]
    layers += [(Layer(*narrow), 90, [key for key in greater if ALL or key not in FIRST])]
    layers += [(Layer(MANY, *narrow[1:]), 90, RICHEST if ALL else FIRST)]
    for at, arch, which in layers:
        for options, call in products(at, which=which):
            yield options, at.dtype, at.narrow, arch, call
    yield from chosen_narrow(others)
    small = [key for key in few if key[0] == "gram_grad" or not OLDEST]
    for sizes, arch, which in ((wide, 90, greater), (wide, 120, few), (odd, 90, small)):
        for options, call in products(Layer(*sizes, torch.float32), which=which):
            yield f"{options}, full float32", torch.float32, sizes[2], arch, functools.partial(in_full, call)


def chosen_narrow(others):
    """Both gradients in one pass: all options in bfloat16 on sm_90 once for each width, the richest elsewhere."""
    first, second, third = NARROW
    layers = [(DTYPES[0], first, 90, EVERY)]
    layers += [] if OLDEST else [(DTYPES[0], second, 90, EVERY), (DTYPES[0], third, 90, EVERY if ALL else RICHEST)]
    for arch in others:
        layers += [(DTYPES[0], first, arch, EVERY if ALL else GREATER)]
        layers += [(DTYPES[0], sizes, arch, EVERY if ALL else FIRST) for sizes in (second, third)]
    for dtype, sizes, arch, which in (*layers, (DTYPES[1], first, 90, EVERY if ALL else FIRST)):
        for options, call in products(Layer(*sizes, dtype), narrow_calls, which=which):
            yield options, dtype, sizes[2], arch, call


def chosen_dense():  # bfloat16 everywhere, other dtypes and an odd layer on sm_90
    wide = (64, 14, 128, 512)
    layers = [(Layer(*wide), arch) for arch in ARCHS] + [(Layer(*wide, dtype), 90) for dtype in DTYPES[1:]]
    for at, arch in (*layers, *([] if OLDEST else [(Layer(64, 14, 33, 65), 90)])):
        for options, call in products(at, dense_calls):
            yield options, at.dtype, at.narrow, arch, call
            if at.dtype == torch.float32 and not OLDEST:
                yield f"{options}, full float32", at.dtype, at.narrow, arch, functools.partial(in_full, call)


def in_full(call):
    with setting(torch.backends.cudnn, "allow_tf32", False):
        return call()
