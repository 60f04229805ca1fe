"""Calls of every Triton op as a network makes them, for the scripts that count, compile and bind launches.

``Layer`` says where tensors come from; real ones in the interpreter, meta tensors where nothing runs. Options are the
richest that blocks ask for, so that every optional argument of every kernel is in one call at least.
"""

import dataclasses
import itertools

import torch

from resnet_fused.backends import triton as room
from resnet_fused.ops import activation
from resnet_fused.ops.contract import channels_last_strides


@dataclasses.dataclass
class Layer:
    """A batch of images with the narrow and the wide channels of a bottleneck."""

    samples: int
    size: int
    narrow: int
    wide: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "meta"

    def data(self, channels, size=None, dtype=None):
        shape = (self.samples, channels, size or self.size, size or self.size)
        strides = channels_last_strides(shape)
        empty = torch.empty_strided(shape, strides, dtype=dtype or self.dtype, device=self.device)
        return empty if self.device == "meta" else empty.copy_(torch.rand(shape))

    def vector(self, channels):
        return torch.ones(channels, device=self.device)

    def vectors(self, channels, *names):
        return {name: self.vector(channels) for name in names}

    def weight(self, outputs, inputs):
        return torch.ones((outputs, inputs, 1, 1), dtype=self.dtype, device=self.device)

    def matrix(self, rows, columns):
        return torch.ones((rows, columns), device=self.device)

    def bits(self, channels, size=None):
        shape = (self.samples * (size or self.size) ** 2, (channels + 7) // 8)
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def factor(self):
        return {"sample_factor": self.vector(self.samples)}

    def update(self, channels):
        """One norm's arguments of `running_update`."""
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        running_mean, running_var, mean, var = (self.vector(channels) for _ in range(4))
        return running_mean, running_var, count, mean, var, 1.5

    def norm(self, channels):
        """What an op that takes statistics needs for batch norm; parameters lie in the data's dtype."""
        vectors = (self.vector(channels).to(self.dtype) for _ in range(2))
        return dict(zip(("gamma", "beta"), vectors, strict=True)) | {"eps": 1e-5}


def forward_calls(at):
    """1x1 convolutions and joins: (op, options, arguments, keywords)."""
    c, k = at.narrow, at.wide
    lazy = at.vectors(c, "x_scale", "x_shift")
    yield "conv1x1", "lazy, narrow to wide, batch norm", (at.data(c), at.weight(k, c)), lazy | at.norm(k)
    yield "conv1x1", "wide to narrow", (at.data(k), at.weight(c, k)), {"emit_stats": False}
    yield "conv1x1", "stride 2, statistics", (at.data(k, 2 * at.size), at.weight(c, k)), {"stride": [2, 2]}
    arguments = (at.data(c), at.weight(k, c), at.vector(k), at.vector(k))
    yield "conv1x1_join", "lazy, residual, mask", arguments, lazy | {"residual": at.data(k), "emit_mask": True}
    affine = {"residual": at.data(k)} | at.vectors(k, "residual_scale", "residual_shift")
    options = lazy | affine | at.factor() | {"emit_mask": True}
    yield "conv1x1_join", "lazy, affine residual, factor, mask", arguments, options
    projection = {"x2": at.data(k // 2, 2 * at.size), "weight2": at.weight(k, k // 2), "stride2": [2, 2]}
    options = lazy | projection | at.vectors(k, "scale2", "shift2") | at.factor() | {"emit_mask": True}
    yield "conv1x1_join", "lazy, strided projection, factor, mask", arguments, options
    yield "gram", "plain", (at.data(c), at.vector(c)), {}
    yield "gram", "lazy", (at.data(c), at.vector(c), at.vector(c), at.vector(c)), {}
    yield "gram", "stride 2", (at.data(c, 2 * at.size - 1), at.vector(c)), {"stride": [2, 2]}


def backward_calls(at):
    """Their gradients."""
    c, k = at.narrow, at.wide
    joined = {"mask": at.bits(k), "a": at.vector(k)} | at.factor()
    lazy = {"x": at.data(c)} | at.vectors(c, "x_scale", "x_shift", "x_mean")
    coupling = {"coupling": at.weight(c, c), "constant": at.vector(c)}
    arguments = (at.data(k), at.weight(k, c))
    yield "conv1x1_dgrad", "Gram join: bits, factor, coupling, sums", arguments, joined | lazy | coupling
    projection = {"mask": at.bits(k), "a": at.vector(k), "x": at.data(c, 2 * at.size - 1), "x_stride": [2, 2]}
    yield "conv1x1_dgrad", "strided projection: bits, coupling", arguments, projection | coupling
    through = {"z": at.data(k)} | at.vectors(k, "a", "b", "d", "scale", "shift")
    yield "conv1x1_dgrad", "lazy gradient, coefficients", arguments, through | lazy | at.vectors(c, "x_rstd")
    both = lazy | {"weight_grad": True}
    yield "conv1x1_dgrad", "both gradients, coefficients", arguments, through | both | at.vectors(c, "x_rstd")
    through = {"z": at.data(c)} | at.vectors(c, "a", "b", "d", "scale", "shift")
    arguments = (at.data(c), at.weight(c, k))
    masked = {"residual": at.data(k), "residual_mask": at.bits(k)}
    yield "conv1x1_dgrad", "no weight: coupling, sums", (at.data(c), None), {"x": at.data(c)} | lazy | coupling
    yield "conv1x1_dgrad", "lazy gradient, masked residual", arguments, through | masked
    strided = {"residual": at.data(k, (at.size + 1) // 2), "residual_stride": [2, 2]}
    yield "conv1x1_dgrad", "lazy gradient, strided residual", arguments, through | strided
    both = {"x": at.data(k), "weight_grad": True}
    yield "conv1x1_dgrad", "both gradients, masked residual", arguments, through | masked | both
    yield "conv1x1_dgrad", "both gradients, strided residual", arguments, through | strided | both
    lazy = at.vectors(c, "x_scale", "x_shift")
    yield "conv1x1_wgrad", "Gram join: bits, lazy", (at.data(k), at.data(c)), {"mask": joined["mask"]} | lazy
    join = {"join_weight": at.weight(k, c), "gram": at.matrix(c, c)} | at.vectors(c, "total", "centre")
    join |= {"mask": joined["mask"]} | at.vectors(k, "join_scale", "join_rstd")
    yield "conv1x1_wgrad", "Gram join: bits, lazy, its matrices", (at.data(k), at.data(c)), join | lazy
    lazy = at.vectors(k, "x_scale", "x_shift")
    rounded = {"rounded": True}
    yield "conv1x1_wgrad", "lazy gradient and input, rounded", (at.data(c), at.data(k)), through | lazy | rounded
    options = {"mask": joined["mask"], "stride": [2, 2]} | joined
    yield "conv1x1_wgrad", "bits, factor, stride 2", (at.data(k), at.data(c, 2 * at.size)), options


def narrow_calls(at):
    """Both gradients in one pass: of the ends of a bottleneck, where they are narrow, in 16 bits."""
    c, k = at.narrow, at.wide
    if at.dtype == torch.float32 or c > 128:
        return
    lazy = at.vectors(c, "x_scale", "x_shift")
    through = {"z": at.data(c)} | at.vectors(c, "a", "b", "d")
    arguments = (at.data(c), at.weight(c, k), at.data(k))
    masked = {"residual": at.data(k), "residual_mask": at.bits(k)}
    yield "conv1x1_backward", "lazy gradient, masked residual", arguments, through | masked
    strided = {"residual": at.data(k, (at.size + 1) // 2), "residual_stride": [2, 2]}
    yield "conv1x1_backward", "lazy gradient, strided residual", arguments, through | strided
    through = {"z": at.data(c)} | at.vectors(c, "a", "b", "d", "scale", "shift")
    arguments = (at.data(c), at.weight(c, c), at.data(c))
    if c <= 64:
        coupled = {"coupling": at.weight(c, c), "constant": at.vector(c), "residual": at.data(c)}
        yield "conv1x1_backward", "lazy gradient, coupling, residual", arguments, through | coupled
    sums = lazy | at.vectors(c, "x_mean") | at.factor()
    rounded = at.vectors(c, "x_rstd") | {"rounded": True}
    yield "conv1x1_backward", "lazy gradient, factor, coefficients, rounded", arguments, through | sums | rounded
    if k > 256:
        return
    arguments = (at.data(k), at.weight(k, c), at.data(c))
    join = {"mask": at.bits(k)} | at.vectors(k, "weight_scale")
    yield "conv1x1_backward", "Gram join: bits, lazy", arguments, join | lazy
    yield "conv1x1_backward", "Gram projection: bits", arguments, join
    plain = {"mask": at.bits(k), "z": at.data(k)} | at.vectors(k, "a", "b", "d")
    yield "conv1x1_backward", "plain join: bits, factor, sums", arguments, plain | sums


def small_calls(at):
    """Batch norm's vectors and the Gram join's small matrices; `z` and `a` lend their shapes only."""
    c, k = at.narrow, at.wide
    v = [at.vector(k) for _ in range(5)]
    yield "bn_affine", "", (*v[:4], at.data(k), 1e-5), {}
    yield "bn_coefficients", "", (*v, at.data(k)), {}
    yield "running_affine", "", (*v, 1e-5), {}
    updates = [at.update(c), at.update(c), at.update(k), at.update(k)]
    (*first, factor), *others = updates
    yield "running_update", "one norm", (*first, factor, 0.1), {}
    yield "running_update", "four norms", (*first, factor, 0.1, *itertools.chain(*others)), {}
    yield "running_affine", "parameters of the data's dtype", (*(t.to(at.dtype) for t in v), 1e-5), {}
    gram = (at.matrix(c, c), at.vector(c), at.vector(c))
    yield "gram_norm", "", (at.weight(k, c), *gram, at.data(c)), {}
    yield "gram_norm", "batch norm", (at.weight(k, c), *gram, at.data(c)), at.norm(k)
    yield "gram_grad", "", (at.weight(k, c), at.matrix(k, c), *gram, *v[:3], at.data(c)), {}
    gram = (at.matrix(k, k), at.vector(k), at.vector(k))
    v = [at.vector(c) for _ in range(3)]
    yield "gram_grad", "wide input", (at.weight(c, k), at.matrix(c, k), *gram, *v, at.data(k)), {}


def gate_calls(at):
    """The ops of a gate, whose factors are [N, C]."""
    k = at.wide
    z = at.data(k)
    yield "gate_add_relu", "residual", (z, at.matrix(at.samples, k)), {"residual": at.data(k)}
    yield "gate_add_relu", "term", (z, at.matrix(at.samples, k), at.matrix(at.samples, k)), {"relu": False}
    yield "gate_add_relu_backward", "output", (z, at.data(k), at.data(k)), {}


def act_calls(at):
    """Batch norm and the activations other than ReLU."""
    c = at.narrow
    for code, name in enumerate(activation.NAMES):
        z, g, act = at.data(c), at.data(c), (code, 0.125)
        a, b, d, scale, shift = (at.vector(c) for _ in range(5))
        yield "norm_act", name, (z, scale, shift, *act), {}
        yield "norm_act_backward", name, (g, z, a, scale, shift, *act), {}
        yield "norm_act_apply", name, (g, z, a, b, d, scale, shift, *act), {}


def pixelwise_calls(at):
    """The ops that move tensors of one shape, and make products of none."""
    k = at.wide
    z, v = at.data(k), at.vector(k)
    yield "bn_stats", "", (z,), {}
    yield "bn_stats", "batch norm", (z,), at.norm(k)
    yield "norm_add_relu", "plain", (z, v, at.vector(k)), {}
    shortcut = {"residual": at.data(k)} | at.vectors(k, "residual_scale", "residual_shift")
    options = shortcut | at.factor() | {"emit_mask": True}
    yield "norm_add_relu", "affine residual, factor, mask", (z, v, at.vector(k)), options
    recompute = {"z": at.data(k)} | at.vectors(k, "mean", "scale", "shift")
    yield "norm_add_relu_backward", "recompute, sums only", (z,), recompute | {"emit_grad": False}
    bits = {"z": at.data(k), "mask": at.bits(k), "residual": at.data(k)} | at.vectors(k, "mean", "residual_mean")
    yield "norm_add_relu_backward", "bits, residual, factor", (z,), bits | at.factor()
    vectors = (v, at.vector(k), at.vector(k))
    yield "norm_relu_coefficients", "recompute", (z, at.data(k), *vectors, at.vector(k)), {}
    yield "norm_relu_coefficients", "bits, factor", (z, at.data(k), *vectors), {"mask": at.bits(k)} | at.factor()
    yield "lazy_grad_apply", "frozen", (z, None, v), {}
    affine = at.vectors(k, "b", "d", "scale", "shift")
    options = affine | at.factor() | {"residual": at.data(k)}
    yield "lazy_grad_apply", "affine, sign, factor, residual", (z, at.data(k), v), options
    yield "lazy_grad_apply", "bits, affine", (z, at.data(k), v), at.vectors(k, "b", "d") | {"mask": at.bits(k)}
    yield "lazy_grad_apply", "bits, residual", (z, None, None), {"mask": at.bits(k), "residual": at.data(k)}
    yield from gate_calls(at)
    yield from act_calls(at)


def pool_calls(at):
    """The stem: batch norm, ReLU and a 3x3 maximum of every other pixel."""
    c, pooled = at.narrow, (at.size + 1) // 2
    z, vectors = at.data(c), (at.vector(c), at.vector(c))
    yield "norm_relu_pool", "", (z, *vectors), {}
    gathered = (at.data(c, pooled), at.data(c, pooled, torch.uint8), z)
    yield "norm_relu_pool_backward", "", (*gathered, at.vector(c), *vectors), {}
    yield "norm_relu_pool_apply", "affine", (*gathered, at.vector(c), at.vector(c), at.vector(c), *vectors), {}


def average_calls(at):
    """A transition between dense blocks: batch norm, ReLU and averages of 2x2 pixels."""
    c, size = at.narrow, max(2, at.size)
    x, vectors = at.data(c, size), (at.vector(c), at.vector(c))
    yield "norm_relu_avg_pool", "", (x, *vectors), {}
    pooled = (at.data(c, size // 2), x)
    yield "norm_relu_avg_pool_backward", "", (*pooled, at.vector(c), *vectors), {}
    yield "norm_relu_avg_pool_apply", "affine", (*pooled, at.vector(c), at.vector(c), at.vector(c), *vectors), {}


def dense_calls(at):
    """A layer of a dense block. The odd layer's 3x3 weight is contiguous, the others' are channels_last."""
    c, k = at.wide, min(at.narrow, 128)
    g = k // 4 | k % 2
    weight = torch.ones((g, k, 3, 3), dtype=at.dtype, device=at.device)
    weight = weight if k % 2 else weight.contiguous(memory_format=torch.channels_last)
    yield "dense_enter", "", (at.data(k), at.data(k)), {}
    yield "dense_leave", "", (at.data(k), at.data(k), at.vector(k), at.vector(k)), {}
    prefix = (at.data(c), at.weight(k, c), at.vector(c), at.vector(c))
    yield "dense_conv1x1", "statistics", prefix, {}
    yield "dense_conv3x3", "statistics", (at.data(k), weight, at.vector(k), at.vector(k), at.data(g)), {}
    gathered = (at.data(g), at.data(g), at.vector(g), at.vector(g))
    yield "dense_conv3x3_backward", "", (*gathered, at.data(k), weight, *(at.vector(k) for _ in range(3))), {}
    through = (at.data(k), at.data(k), *(at.vector(k) for _ in range(3)))
    yield "dense_conv1x1_backward", "", (at.data(c), at.data(c), *through, *prefix, at.vector(c)), {}


MAKERS = (
    *(pixelwise_calls, pool_calls, average_calls),
    *(forward_calls, backward_calls, narrow_calls, small_calls, dense_calls),
)


def calls(at, *makers):
    """Calls of the ops that the backend declares."""
    for make in makers or MAKERS:
        yield from (call for call in make(at) if call[0] in room.OPS)
