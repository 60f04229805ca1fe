"""Evaluation on a GPU: batch norm, add and ReLU where a tensor is written or read anyway, weights as they are.

Nothing is folded into weights and nothing is kept between calls. Scale and shift of each batch norm are made from the
running statistics at every call, by one small kernel, so a write through ``.data`` or between two replays of a CUDA
graph is seen. A chain becomes:

* 1x1 convolutions of stride 1: `conv1x1_join`, whose epilogue scales, shifts, adds and clamps the float32 accumulator;
  at the end of a chain with the residual, or with a 1x1 projection in the same kernel.
* Others: ATen's, written raw. A 1x1 convolution behind one normalises on load; else `norm_add_relu` does, with the
  residual if it is the last, or `norm_relu_pool`, at the end of a stem.

Beside stock (a convolution, a batch norm and a ReLU each, and an add) that moves less and is never a launch more; a
last batch norm with nothing behind it, where it would be one, is stock's. Not taken: ATen's fused
``cudnn_convolution_relu``. It hands cuDNN its own uninitialised output as a summand with a factor of 0, one more read
and, where that memory held NaN, perhaps NaN; and it wants folded weights.

Where a kernel is missing or failed its self-check, the chain does with the others, or is stock's operations.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import backends, run, soundness
from ..plan import choose
from ..steps import Chain, Step, StepTensors, stock
from ..steps.batch_norm import running_affine
from ..steps.conv import channels_last

Tensor = torch.Tensor
aten = torch.ops.aten


class Raw(NamedTuple):
    """A convolution's output; its batch norm and ReLU are still to be applied, as ``relu(scale*z + shift)``."""

    z: Tensor
    scale: Tensor
    shift: Tensor


class Form(NamedTuple):
    """How a chain runs."""

    products: tuple[bool, ...] = ()  # of each step of the main branch: whether `conv1x1_join` takes it
    lacking: str = ""  # the op for want of whose kernel this is not the best form
    stock: bool = False

    def __str__(self) -> str:
        ways = {True: "batch norm, add and ReLU in 1x1 convolutions", False: "batch norm, add and ReLU in one pass"}
        text = "stock" if self.stock else f"evaluation: {ways[any(self.products)]}"
        return text + (f" (no sound kernel of {self.lacking})" if self.lacking else "")


def takes(x: Tensor) -> bool:
    """Whether evaluation on `x` is this module's."""
    return choose.on_gpu(x)


def _is_product(step: Step, own: StepTensors) -> bool:
    return step.conv.is_pointwise(own.weight) and step.conv.stride == (1, 1)


def _is_bare(chain: Chain, residual: Tensor | None) -> bool:
    """Whether the chain ends in a batch norm with nothing behind it."""
    return not chain.relu and chain.shortcut is None and residual is None


def _ops(chain: Chain, products: tuple[bool, ...], residual: Tensor | None) -> tuple[str, ...]:
    """What the chain would run beside ATen's convolutions and the affine maps."""
    needed = {"conv1x1_join"} if any(products) else set()
    if any(not before and not after for before, after in itertools.pairwise(products)):
        needed.add("norm_add_relu")
    if chain.pool is not None:
        needed.add("norm_relu_pool")
    elif not products[-1] and not _is_bare(chain, residual):
        needed.add("norm_add_relu")
    return tuple(sorted(needed))


def choose_form(chain: Chain, x: Tensor, tensors: list[StepTensors], residual: Tensor | None) -> Form:
    """The best form whose kernels are all sound here; where a backend is forced, the best that it has."""
    pairs = list(zip(chain.steps, tensors, strict=False))
    products = tuple(_is_product(step, own) and chain.pool is None for step, own in pairs)
    without = (False,) * len(products)
    if chain.backend != "auto":
        return Form(products if "conv1x1_join" in backends()[chain.backend].kernels else without)
    place, checks = choose.place_of(x), not isinstance(x, FakeTensor)
    for own in tensors:
        if soundness.lacking(("running_affine",), own.running_mean.dtype, place, checks):
            return Form(lacking="running_affine", stock=True)
    missing = soundness.lacking(_ops(chain, products, residual), x.dtype, place, checks)
    if not missing:
        return Form(products)
    if any(products) and not soundness.lacking(_ops(chain, without, residual), x.dtype, place, checks):
        return Form(without, missing)
    return Form(lacking=missing, stock=True)


def output(chain: Chain, x: Tensor, tensors: list[StepTensors], residual: Tensor | None) -> Tensor:
    """The chain's output with running statistics and without autograd."""
    form = choose_form(chain, x, tensors, residual)
    for observer in choose.observers:
        observer(str(form))
    if form.stock:
        return stock.chain_output(chain, x, residual, None, tensors, moves=True)
    x, residual = channels_last(x), None if residual is None else channels_last(residual)
    value: Tensor | Raw = x
    for step, own, product in zip(chain.steps[:-1], tensors, form.products, strict=False):
        value = _product(chain, step, own, value) if product else _raw(chain, step, own, value)
    return _end(chain, value, x, tensors, residual, form.products[-1])


def _affine(chain: Chain, step: Step, own: StepTensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bn = running_affine(own, step.norm, dtype, chain.backend, own.bias)
    return bn.scale, bn.shift


def _product(chain: Chain, step: Step, own: StepTensors, value: Tensor | Raw, relu: bool = True, **options) -> Tensor:
    """A 1x1 convolution of stride 1 with all that follows it."""
    x, *before = value if isinstance(value, Raw) else (value, None, None)
    arguments = (x, own.weight.contiguous(), *_affine(chain, step, own, x.dtype), *before)
    return run("conv1x1_join", *arguments, **options, relu=relu, backend=chain.backend)[0]


def _raw(chain: Chain, step: Step, own: StepTensors, value: Tensor | Raw) -> Raw:
    """Any convolution, and what is still to be applied to its output; the bias is part of that."""
    h = _written(chain, value)
    stride, padding, dilation, groups = step.conv.args
    z = aten.convolution(h, own.weight, None, stride, padding, dilation, False, [0, 0], groups)
    return Raw(channels_last(z), *_affine(chain, step, own, h.dtype))


def _written(chain: Chain, value: Tensor | Raw) -> Tensor:
    return run("norm_add_relu", *value, backend=chain.backend)[0] if isinstance(value, Raw) else value


def _end(chain: Chain, value: Tensor | Raw, x: Tensor, tensors: list[StepTensors], residual, product: bool) -> Tensor:
    """The last step of the main branch, and what is added to it."""
    step, own, other = chain.steps[-1], tensors[len(chain.steps) - 1], {}
    if not product and chain.pool is None and _is_bare(chain, residual):
        return channels_last(stock.conv_norm(_written(chain, value), own, step))
    if chain.shortcut is not None:
        projection, its = chain.shortcut, tensors[-1]
        if product and projection.conv.is_pointwise(its.weight):
            scale, shift = _affine(chain, projection, its, x.dtype)
            other = {"x2": x, "weight2": its.weight.contiguous(), "scale2": scale, "shift2": shift}
            other["stride2"] = projection.conv.stride
        else:
            r = _raw(chain, projection, its, x)
            other = {"residual": r.z, "residual_scale": r.scale, "residual_shift": r.shift}
    elif residual is not None:
        other = {"residual": residual}
    if product:
        return _product(chain, step, own, value, chain.relu, **other)
    z = _raw(chain, step, own, value)
    if chain.pool is not None:
        return run("norm_relu_pool", *z, *chain.pool.args, backend=chain.backend)[0]
    return run("norm_add_relu", *z, **other, relu=chain.relu, backend=chain.backend)[0]
