"""Small cases for the self-check: odd channels, tail rows, the options that matter, one or two per branch of a kernel.

Values lie on a coarse grid (:mod:`.draws`), so that what is left to differ is the rounding of the result.
Only `bn_stats` gets a case with a large mean, where order matters.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...ops import OPS, winograd_weight3x3
from ...ops.contract import pack_mask
from . import act_cases, average_cases, conv_cases, dense_cases, gate_cases, lazy_cases
from .draws import ODD, TAIL, Case, Draw

Tensor = torch.Tensor


def _bn_stats(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("odd channels", (Draw(ODD).data(),), {})
    yield Case("large mean, tail rows", (Draw(TAIL).far_from_zero(dtype),), {})
    tail = Draw(TAIL)
    yield Case("batch norm, tail rows", (tail.data(),), lazy_cases.norm(tail, 40))


def _add_stats(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    yield Case("odd channels", (odd.data(), odd.data()), {})
    yield Case("factor, large mean", (tail.data(), tail.far_from_zero(dtype)), {"sample_factor": tail.factor()})


def _norm_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    z = odd.data()
    z[0, 0, 0, 0] = torch.nan
    yield Case("NaN, mask, odd channels", (z, odd.vector(), odd.vector()), {"emit_mask": True})
    yield Case("residual, no relu", (odd.data(), odd.vector(), odd.vector(), odd.data()), {"relu": False})
    shortcut = {"residual": tail.data(), "residual_scale": tail.vector(), "residual_shift": tail.vector()}
    options = {**shortcut, "sample_factor": tail.factor(), "emit_mask": True}
    yield Case("projection shortcut, factor, mask", (tail.data(), tail.vector(), tail.vector()), options)


def _norm_add_relu_backward(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    recompute = {"z": odd.data(), "mean": odd.vector(), "scale": odd.vector(), "shift": odd.vector()}
    yield Case("recomputed sign, odd channels", (odd.data(),), recompute)
    output = odd.data().clamp_min(0)
    grad_out = torch.where(output <= 0, torch.nan, odd.data())  # a NaN gradient that the mask must drop
    options = {"z": odd.data(), "mean": odd.vector(), "mask": output, "emit_grad": False}
    yield Case("output, sums only", (grad_out,), options)
    bits = {"z": tail.data(), "mean": tail.vector(), "mask": pack_mask(tail.data() > 0)}
    bits |= {"residual": tail.data(), "residual_mean": tail.vector()}
    yield Case("bits, projection shortcut, factor", (tail.data(),), {**bits, "sample_factor": tail.factor()})
    yield Case("no relu", (odd.data(),), {"z": odd.data(), "mean": odd.vector(), "relu": False})


def _norm_relu_coefficients(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    vectors = (odd.vector(), odd.vector().abs(), odd.vector(), odd.vector())
    yield Case("recomputed sign, odd channels", (odd.data(), odd.data(), *vectors), {})
    bits = {"mask": pack_mask(tail.data() > 0), "sample_factor": tail.factor()}
    yield Case("bits, factor", (tail.data(), tail.data(), tail.vector(), tail.vector().abs(), tail.vector()), bits)


def _lazy_grad_apply(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    yield Case("frozen, odd channels", (odd.data(), None, odd.vector()), {})
    vectors = {name: tail.vector() for name in ("b", "d", "scale", "shift")}
    options = {**vectors, "sample_factor": tail.factor()}
    yield Case("affine, sign, factor", (tail.data(), tail.data(), tail.vector()), options)
    options = {**options, "residual": tail.data()}
    yield Case("affine, sign, factor, residual", (tail.data(), tail.data(), tail.vector()), options)
    bits = {"mask": pack_mask(tail.data() > 0), "residual": tail.data()}
    yield Case("bits, residual, no a", (tail.data(), None, None), bits)
    affine = {name: odd.vector() for name in ("b", "d")} | {"mask": pack_mask(odd.data() > 0)}
    yield Case("bits, affine, odd channels", (odd.data(), odd.data(), odd.vector()), affine)


def _conv_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw(TAIL)
    residual = draw.data((3, 24, 9, 7))
    weight = draw.data((24, 40, 1, 1)) / 4
    yield Case("1x1 join", (draw.data(), weight, draw.vector(24), residual), {"relu": True})
    grouped = {"stride": (2, 2), "padding": (1, 1), "groups": 2}
    yield Case("3x3, stride 2, 2 groups", (draw.data(), draw.data((24, 20, 3, 3)) / 4), grouped)


def _conv_norm_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw((1, 40, 2, 2))
    norm = (draw.vector(9), draw.vector(9).abs() + 1, draw.vector(9), draw.vector(9), 1e-5)
    weight, same = draw.data((9, 40, 3, 3)) / 4, ([1, 1], [1, 1], [1, 1], True)
    yield Case("3x3, all behind it", (draw.data(), weight, draw.vector(9), *norm, draw.data((1, 9, 2, 2)), *same), {})
    yield from conv_cases.tiles()


def _conv_norm_add_relu_inplace(dtype: torch.dtype) -> Iterator[Case]:
    draw, k = Draw(TAIL), 40  # more than a panel
    norm = (draw.vector(k), draw.vector(k).abs() + 1, draw.vector(k), draw.vector(k), 1e-5)
    read = (draw.data(), draw.data((k, 40, 1, 1)) / 4, draw.vector(k), *norm)
    yield Case("1x1, added to what is there", (draw.data((3, k, 9, 7)), *read), {"relu": True, "adds": True})
    strided = {"residual": draw.data((3, k, 5, 4)), "stride": [2, 2]}
    yield Case("1x1, stride 2, residual", (draw.data((3, k, 5, 4)), *read), strided)


def _conv_add_relu_inplace(dtype: torch.dtype) -> Iterator[Case]:
    (case, _) = _conv_add_relu(dtype)
    x, weight, shift, residual = case.args
    yield Case(case.name, (residual, x, weight, shift), case.kwargs)


def _conv_weight_grad(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw(TAIL)
    yield Case("1x1", (draw.data((3, 24, 9, 7)), draw.data(), draw.data((24, 40, 1, 1))), {})
    same = {"padding": (1, 1)}
    yield Case("3x3, tail columns", (draw.data((3, 24, 9, 7)), draw.data(), draw.data((24, 40, 3, 3))), same)
    strided = {"stride": (2, 2), "padding": (1, 1)}
    yield Case("3x3, stride 2", (draw.data((3, 24, 5, 4)), draw.data(), draw.data((24, 40, 3, 3))), strided)


def _stem_conv(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw((2, 3, 9, 7))
    where = {"stride": (2, 2), "padding": (3, 3), "statistics": True}
    yield Case("7x7, stride 2, statistics", (draw.data(), draw.data((40, 3, 7, 7)) / 4), where)


def _stem_conv_wgrad(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw((2, 3, 9, 7))
    args = (draw.data((2, 24, 5, 4)), draw.data(), draw.data((24, 3, 7, 7)))
    yield Case("7x7, stride 2", args, {"stride": (2, 2), "padding": (3, 3)})


def _stem_pool_wgrad(dtype: torch.dtype) -> Iterator[Case]:
    draw = lazy_cases.PoolDraw((2, 24, 9, 7))
    pooled = draw.apply()[:8]
    where = {"stride": (1, 1), "padding": (1, 1)}
    yield Case("3x3", (*pooled, draw.data((2, 3, 9, 7)), draw.data((24, 3, 3, 3))), where)


def _conv_norm_relu_pool(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw((2, 3, 13, 11))
    norm = (draw.vector(40), draw.vector(40).abs() + 1, draw.vector(40), draw.vector(40), 1e-5)
    weight, where = draw.data((40, 3, 7, 7)) / 4, ([2, 2], [3, 3])
    yield Case("7x7, stride 2, pool", (draw.data(), weight, draw.vector(40), *norm, *where), {})


def _winograd_conv3x3(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw(TAIL)
    weight = draw.data((40, 24, 3, 3)) / 4
    yield Case("gradient, no padding", (draw.data(), weight, 0, True), {})
    yield Case("statistics, tail channels", (draw.data((3, 24, 9, 7)), weight, 1), {"statistics": True})


def _winograd_conv3x3_wgrad(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw(TAIL)
    yield Case("tail columns", (draw.data((3, 24, 9, 7)), draw.data(), draw.data((24, 40, 3, 3))), {})
    args = (draw.data((3, 24, 7, 5)), draw.data(), draw.data((24, 40, 3, 3)).contiguous(), (0, 0))
    yield Case("no padding, contiguous weight", args, {})


def _grouped_conv3x3(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw((3, 24, 9, 7))
    for width in (4, 8, 24):  # groups to a vector, and a vector and a half to a group
        weight = draw.data((24, width, 3, 3)) / 4
        yield Case(f"groups of {width}, statistics", (draw.data(), weight), {"statistics": True})
        yield Case(f"groups of {width}, stride 2", (draw.data(), weight, 2), {})
        yield Case(f"groups of {width}, gradient", (draw.data(), weight, 1, True), {})
        yield Case(f"groups of {width}, gradient of stride 2", (draw.data(), weight, 2, True, False, (1, 0)), {})


def _grouped_conv3x3_wgrad(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw((3, 24, 9, 7))
    for width in (4, 8, 24):
        weight = draw.data((24, width, 3, 3))
        yield Case(f"groups of {width}", (draw.data(), draw.data(), weight), {})
        yield Case(f"groups of {width}, stride 2", (draw.data((3, 24, 5, 4)), draw.data(), weight, 2), {})


def _winograd_weight3x3(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw(TAIL)
    weight, scale = draw.data((40, 24, 3, 3)), draw.vector(40)
    yield Case("2 outputs, scaled", (weight, scale), {})
    yield Case("4 outputs, contiguous", (weight.contiguous(), None, 4), {})
    yield Case("stride 2", (weight, scale), {"stride": 2})


def _winograd_conv3x3_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw(TAIL)
    weight, scale, shift = draw.data((24, 40, 3, 3)) / 4, draw.vector(24), draw.vector(24)
    args = (draw.data(), weight, winograd_weight3x3.reference(weight, scale), scale, shift)
    yield Case("all behind it", (*args, draw.data((3, 24, 9, 7))), {"relu": True})
    args = (draw.data(), weight, winograd_weight3x3.reference(weight, None, 4))
    yield Case("4 outputs, no padding", args, {"padding": 0})
    x, weight = draw.data((3, 32, 9, 7)), draw.data((24, 32, 3, 3)) / 4
    args = (x, weight, winograd_weight3x3.reference(weight, scale, stride=2), scale, shift)
    yield Case("stride 2", (*args, draw.data((3, 24, 5, 4))), {"relu": True, "stride": 2})


_CASES = {
    "bn_stats": _bn_stats,
    "add_stats_": _add_stats,
    "bn_affine": lazy_cases.bn_affine,
    "bn_coefficients": lazy_cases.bn_coefficients,
    "running_affine": lazy_cases.running_affine,
    "running_update": lazy_cases.running_update,
    "norm_add_relu": _norm_add_relu,
    "norm_add_relu_backward": _norm_add_relu_backward,
    "norm_relu_coefficients": _norm_relu_coefficients,
    "lazy_grad_apply": _lazy_grad_apply,
    "lazy_grad_apply_": _lazy_grad_apply,
    "gate_add_relu": gate_cases.gate_add_relu,
    "gate_add_relu_": gate_cases.gate_add_relu,
    "gate_add_relu_backward": gate_cases.gate_add_relu_backward,
    "gram": lazy_cases.gram,
    "conv_values": conv_cases.conv_values,
    "conv_join": conv_cases.conv_join,
    "conv1x1": lazy_cases.conv1x1,
    "conv1x1_join": lazy_cases.conv1x1_join,
    "conv1x1_dgrad": lazy_cases.conv1x1_dgrad,
    "conv1x1_wgrad": lazy_cases.conv1x1_wgrad,
    "conv1x1_backward": lazy_cases.conv1x1_backward,
    "conv_add_relu": _conv_add_relu,
    "conv_add_relu_": _conv_add_relu_inplace,
    "conv_norm_add_relu": _conv_norm_add_relu,
    "conv_norm_add_relu_": _conv_norm_add_relu_inplace,
    "conv_chain": conv_cases.conv_chain,
    "conv_norm_relu_pool": _conv_norm_relu_pool,
    "conv_weight_grad": _conv_weight_grad,
    "stem_conv": _stem_conv,
    "stem_conv_wgrad": _stem_conv_wgrad,
    "stem_pool_wgrad": _stem_pool_wgrad,
    "winograd_conv3x3": _winograd_conv3x3,
    "winograd_conv3x3_wgrad": _winograd_conv3x3_wgrad,
    "winograd_conv3x3_add_relu": _winograd_conv3x3_add_relu,
    "winograd_weight3x3": _winograd_weight3x3,
    "grouped_conv3x3": _grouped_conv3x3,
    "grouped_conv3x3_wgrad": _grouped_conv3x3_wgrad,
    "gram_norm": lazy_cases.gram_norm,
    "gram_grad": lazy_cases.gram_grad,
    "norm_relu_pool": lazy_cases.norm_relu_pool,
    "norm_relu_pool_backward": lazy_cases.norm_relu_pool_backward,
    "norm_relu_pool_apply": lazy_cases.norm_relu_pool_apply,
    **dense_cases.CASES,
    **act_cases.CASES,
    "norm_relu_avg_pool": average_cases.norm_relu_avg_pool,
    "norm_relu_avg_pool_backward": average_cases.norm_relu_avg_pool_backward,
    "norm_relu_avg_pool_apply": average_cases.norm_relu_avg_pool_apply,
}


def cases(op: str, dtype: torch.dtype) -> list[Case]:
    """The cases of `op` for activations of `dtype`.

    Raises:
        KeyError: the op has no cases; then no kernel of it can be checked.
    """
    return list(_CASES[op](dtype))


def one(op: str, dtype: torch.dtype) -> Case:
    """The richest of :func:`cases`: whether a kernel compiles and runs at all, where each configuration is judged."""
    return cases(op, dtype)[-1]


def missing_cases() -> list[str]:
    """Ops without cases."""
    return sorted(set(OPS) - set(_CASES))
