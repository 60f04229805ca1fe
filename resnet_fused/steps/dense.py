"""A whole dense block (Huang et al. 2017, https://arxiv.org/abs/1608.06993) as one step, on one buffer.

The block's input and what its layers make lie side by side in one channels_last buffer, which is the block's output: a
layer reads a prefix of it and writes a slice, so that nothing is concatenated. The mean and second moment of a channel
are found once, by the kernel that writes it, however many norms read it; each norm makes its own scale and shift of
them, and is applied on load.

Backward, of a norm's gradient ``scale*h + B*x + D`` only ``scale*h`` is added to the gradient of the prefix. B and D
gather in two vectors over the channels of the buffer, and whoever reads a channel's gradient last, the convolution that
made it or the block's input, applies them: one pass for a layer, where stock has one for each pair of layers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from .. import library
from ..backends import run
from ..ops import stat_dtype
from ..ops.contract import channels_last_strides
from .batch_norm import Affine, Coefficients, batch_affine, coefficients, pixels, running_affine
from .flow import Backward, Forward
from .layout import Moments
from .lazy import Lazy, Pending
from .program import Concatenation, Convolution, Normalisation, Program
from .running import Update, update_running_all
from .spec import Conv, Norm, StepGrads, StepTensors

Tensor = torch.Tensor
#: What a block keeps of the tensors between its layers' convolutions: all of them; none, they are computed again in
#: backward; none as stock's checkpoints do it, which move the running statistics of the norm before them again.
SAVES = KEPT, RECOMPUTED, CHECKPOINTED = "kept", "recomputed", "checkpointed"
POINTWISE, THREE = Conv(), Conv(padding=(1, 1))


def dense_program(layers: int, saves: str = KEPT) -> Program:
    """The program of a block of so many layers, each norm-ReLU-1x1-norm-ReLU-3x3; geometry and norms as by default."""
    nodes, parts, norm = [], [0], Norm()
    for i in range(layers):
        source = 5 * i
        nodes += [Normalisation(source, norm), Convolution(source + 1, POINTWISE)]
        nodes += [Normalisation(source + 2, norm), Convolution(source + 3, THREE)]
        parts.append(source + 4)
        nodes.append(Concatenation(tuple(parts)))
    return Program(tuple(nodes), dense=saves)


class Layer(NamedTuple):
    """The values of a dense layer, and the channels of the buffer from which on it writes and up to which."""

    source: int
    norm1: int
    conv1: int
    norm2: int
    conv2: int
    start: int
    end: int

    @classmethod
    def behind(cls, source: int, start: int, end: int) -> Layer:
        """The layer that reads the value `source`."""
        return cls(source, source + 1, source + 2, source + 3, source + 4, start, end)


def layers_of(program: Program, tensors: list[StepTensors], entering: int) -> list[Layer]:
    """The layers of a dense block, whose input has so many channels. `tensors`: by value."""
    found = []
    for source in range(0, program.output, 5):
        found.append(Layer.behind(source, entering, entering + tensors[source + 4].weight.shape[0]))
        entering = found[-1].end
    return found


def new_images(like: Tensor, channels: int) -> Tensor:
    """Memory for images of the size of `like`, channels_last; on a CPU of what is kept, in huge pages."""
    shape = like.shape[0], channels, *like.shape[2:]
    if like.is_cpu and type(like) is Tensor and library.status().cpu.loaded:
        form = torch.empty_strided((0, *shape[1:]), channels_last_strides(shape), dtype=like.dtype)
        return torch.ops.resnet_fused.new_batch(form, shape[0])
    return torch.empty_strided(shape, channels_last_strides(shape), dtype=like.dtype, device=like.device)


@dataclasses.dataclass(frozen=True)
class DenseBlock:
    """The dense block that makes `value`."""

    value: int

    @property
    def word(self) -> str:
        return "dense layers on one buffer"

    def ops(self, program: Program) -> tuple[str, ...]:
        return (
            *("dense_enter", "dense_conv1x1", "dense_conv3x3"),
            *("dense_conv3x3_backward", "dense_conv1x1_backward", "dense_leave"),
        )

    def forward(self, f: Forward) -> None:
        x, emits = f.values[0], f.program.batch_stats
        layers = layers_of(f.program, f.tensors, x.shape[1])
        buffer = new_images(x, layers[-1].end)
        first, moments = buffer[:, : x.shape[1]], None
        if emits:
            moments = tuple(buffer.new_empty(layers[-1].end, dtype=stat_dtype(x.dtype)) for _ in range(2))
            _note(moments, run("dense_enter", x, first, backend=f.backend), 0, x.shape[1])
        else:
            first.copy_(x)
        running = _running_affines(f)
        for layer in layers:
            self._layer_forward(f, layer, buffer, moments, running)
        f.output = buffer.detach()  # views of the buffer are saved: of the output they would hold the node
        f.values[self.value] = buffer
        if moments is not None:
            f.emitted[self.value] = moments

    def _layer_forward(
        self, f: Forward, layer: Layer, buffer: Tensor, moments: Moments | None, running: dict[int, Affine]
    ) -> None:
        prefix, emits = buffer[:, : layer.start], moments is not None
        before = None if moments is None else tuple(vector[: layer.start] for vector in moments)
        bn1 = running.get(layer.norm1) or self._affine(f, layer.norm1, prefix, before)
        weights = f.tensors[layer.conv1].weight, f.tensors[layer.conv2].weight
        norm2 = f.program.maker(layer.norm2).norm
        arguments = prefix, weights[0], bn1.scale, bn1.shift, norm2.batch_stats
        z, *between = run("dense_conv1x1", *arguments, backend=f.backend)
        bn2 = running.get(layer.norm2) or self._affine(f, layer.norm2, z, between)
        written = buffer[:, layer.start : layer.end]
        made = run("dense_conv3x3", z, weights[1], bn2.scale, bn2.shift, written, emits, backend=f.backend)
        if emits:
            _note(moments, made, layer.start, layer.end)
        if f.wanted[layer.conv1]:
            f.values[layer.norm1] = Lazy(prefix, bn1)
        if f.wanted[layer.conv2]:  # z can be made again of what is saved for its convolution
            again = f.program.dense != KEPT and f.wanted[layer.conv1]
            f.values[layer.norm2] = Lazy(z.new_empty((0, *z.shape[1:])) if again else z, bn2)

    @staticmethod
    def _affine(f: Forward, value: int, z: Tensor, moments: tuple[Tensor, Tensor]) -> Affine:
        """The batch norm that makes `value`, of z."""
        own, norm = f.tensors[value], f.program.maker(value).norm
        if not norm.batch_stats:
            return running_affine(own, norm, z.dtype, f.backend)._replace(centre=None)
        affine, statistics = batch_affine(*moments, own, norm, z, f.backend)
        f.note(value, statistics)
        return affine._replace(centre=None)

    def backward(self, b: Backward, grad: Pending) -> None:
        buffer = b.values[self.value]
        stat = stat_dtype(buffer.dtype)
        sums = tuple(torch.zeros(buffer.shape[1], dtype=stat, device=buffer.device) for _ in range(2))
        gathered, end = None, buffer.shape[1]
        for source in range(self.value - 5, -5, -5):
            if not b.wanted[source + 4]:
                break
            layer = Layer.behind(source, end - b.tensors[source + 4].weight.shape[0], end)
            into = new_images(buffer, layer.start) if gathered is None else gathered
            self._layer_backward(b, layer, buffer, grad.grad if gathered is None else None, into, sums)
            gathered, end = into, layer.start
        if b.wanted[0]:
            at = slice(end)
            arguments = gathered[:, at], buffer[:, at], *(vector[at] for vector in sums)
            b.give(0, Pending(run("dense_leave", *arguments, backend=b.backend)))

    def _layer_backward(
        self, b: Backward, layer: Layer, buffer: Tensor, grad: Tensor | None, gathered: Tensor, sums: Moments
    ) -> None:
        """The gradients of one layer. `grad`: of the buffer, of the last layer; of the others it is `gathered`."""
        prefix, own = slice(layer.start), slice(layer.start, layer.end)
        weights = b.tensors[layer.conv1].weight, b.tensors[layer.conv2].weight
        z, bn2, _ = b.values[layer.norm2]
        if b.wanted[layer.conv1]:
            x, bn1, _ = b.values[layer.norm1]
        if not z.numel():
            z = run("dense_conv1x1", x, weights[0], bn1.scale, bn1.shift, False, backend=b.backend)[0]
        arguments = (gathered if grad is None else grad)[:, own], buffer[:, own], *(vector[own] for vector in sums)
        arguments = *arguments, z, weights[1], bn2.scale, bn2.shift, bn2.mean
        g, *found, grad_weight = run("dense_conv3x3_backward", *arguments, backend=b.backend)
        b.grads[layer.conv2] = StepGrads(grad_weight if b.needs[layer.conv2].weight else None)
        through = self._coefficients(b, layer.norm2, bn2, found, z)
        if not b.wanted[layer.conv1]:
            return
        between = through.b, through.d
        if through.b is None:
            between = (torch.zeros_like(bn2.scale),) * 2
        before = None if grad is None else grad[:, prefix]
        arguments = gathered[:, prefix], before, g, z, bn2.scale, *between, x, weights[0]
        *found, grad_weight = run(
            "dense_conv1x1_backward", *arguments, bn1.scale, bn1.shift, bn1.mean, backend=b.backend
        )
        b.grads[layer.conv1] = StepGrads(grad_weight if b.needs[layer.conv1].weight else None)
        through = self._coefficients(b, layer.norm1, bn1, found, x)
        if through.b is not None:
            sums[0][prefix].add_(through.b)
            sums[1][prefix].add_(through.d)

    @staticmethod
    def _coefficients(b: Backward, value: int, bn: Affine, sums: list[Tensor], z: Tensor) -> Coefficients:
        """The backward of the norm that makes `value`, of z, from the sums over the gradient behind it."""
        found, need = coefficients(bn, *sums, z, b.program.maker(value).norm, b.backend), b.needs[value]
        grads = found.grad_gamma if need.gamma else None, found.grad_beta if need.beta else None
        b.grads[value] = StepGrads(None, None, *grads)
        return found


class _MovingAgain(torch.autograd.Function):
    """A block's output as it is; backward moves running statistics once more."""

    @staticmethod
    def forward(ctx, out: Tensor, updates: list[Update]) -> Tensor:
        ctx.updates = updates
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        update_running_all(ctx.updates)
        return grad, None


def moving_again(
    out: Tensor, program: Program, tensors: list[StepTensors], entering: Tensor, moments: Moments
) -> Tensor:
    """The output of a block that is :data:`CHECKPOINTED`: in backward stock runs the first norm of its layers again.

    But for those of layers of whose features, `entering` and what layers before made, none wants a gradient. `tensors`:
    of the nodes; `moments`: of the output.
    """
    updates, count, wants = [], pixels(out.shape), entering.requires_grad
    for layer in layers_of(program, [StepTensors(None), *tensors], entering.shape[1]):
        norm, own = program.maker(layer.norm1).norm, tensors[layer.norm1 - 1]
        if norm.batch_stats and wants:
            mean, m2 = (vector[: layer.start] for vector in moments)
            updates.append((own, norm, mean, m2 / count, count))
        parameters = (t for each in tensors[layer.source : layer.source + 4] for t in each[:4])
        wants = wants or any(t is not None and t.requires_grad for t in parameters)
    return _MovingAgain.apply(out, updates) if updates else out


def _running_affines(f: Forward) -> dict[int, Affine]:
    """What `running_affine` makes of the norms that use running statistics, all at once: the same operations.

    But for those without parameters, or of several dtypes.
    """
    found, dtype = [], stat_dtype(f.values[0].dtype)
    for value, node in f.program.numbered:
        if isinstance(node, Normalisation) and not node.norm.batch_stats:
            vectors = f.tensors[value][2:6]
            if all(t is not None and t.dtype == dtype for t in vectors):
                found.append((value, node.norm.eps, *vectors))
    if not found:
        return {}
    values, eps, gamma, beta, mean, var = map(list, zip(*found, strict=True))
    rstd = torch._foreach_rsqrt(torch._foreach_add(var, eps))
    scale = torch._foreach_mul(gamma, rstd)
    shift = torch._foreach_addcmul(beta, mean, scale, -1)
    mean = torch._foreach_mul(mean, 1.0)  # copies: they may move before backward
    return {value: Affine(*own) for value, *own in zip(values, mean, rstd, scale, shift, strict=True)}


def _note(moments: Moments, found: Moments, start: int, end: int) -> None:
    """Enter the statistics of channels that were just written."""
    for vector, own in zip(moments, found, strict=True):
        vector[start:end].copy_(own)
