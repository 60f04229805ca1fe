"""Is a fused model the stock model? Both against the stock model in float64, every output and every gradient.

The rule: the fused error is at most twice stock's own error in the same dtype, plus a few roundings.

A ReLU is a decision. Where its input is closer to zero than the rounding error, two correct programs may decide
differently, and in a deep network one such flip moves all gradients before it by about a percent. Two runs of *stock*
ResNet-50 that differ in nothing but the memory layout differ that way by factors up to 10,000 in their gradient errors:
one of them had a flip and the other had none. So the rule is applied where it means something:

* to the whole model for outputs and running statistics, which are continuous; its gradients are allowed
  :data:`FLIP_ALLOWANCE` on top, which is far below what a wrong term costs;
* to every distinct block by itself for gradients too, on so few activations that flips are rare, several times with
  other data, comparing medians: a flip here and there does not count, a wrong term does. Where so few are too few to be
  had (the last block of a DenseNet of 264 layers decides about a million values for 4 images of 2x2), most runs have a
  flip, and the smallest errors are compared: a wrong term is in every run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from .blocks import Block, distinct_blocks

FACTOR = 2.0
#: What flipped ReLUs may cost a gradient of a whole model, relative to its norm.
FLIP_ALLOWANCE = 0.1
#: Elements in the input of a block compared by itself: about one float32 run in fifty then has a flip. That is of
#: blocks that normalise up to so many values for each of their input; a dense block normalises up to seventy.
BLOCK_ELEMENTS, NORMALISED = 150_000, 2.0
BLOCK_TRIALS = 5
#: A bias's gradient that is so small beside its weight's, in float64, is zero but for rounding.
ZERO = 1e-9

Observed = dict[str, torch.Tensor]


@contextlib.contextmanager
def copied(model: nn.Module, double: bool) -> Iterator[nn.Module]:
    """A copy of `model` to be run; `double`: in float64."""
    made = copy.deepcopy(model)
    yield made.double() if double else made


@contextlib.contextmanager
def lent(model: nn.Module, double: bool) -> Iterator[nn.Module]:
    """The same without memory for the parameters of both: the copy's are the model's own, for as long in float64.

    For models so large that there is no room for more. Gradients of float64, which every other run is compared with,
    are moved to a file as they are made.
    """
    parameters = list(model.parameters())
    before = [(parameter.dtype, parameter.grad) for parameter in parameters]
    filed = []
    try:
        for parameter in parameters:
            parameter.grad = None
        made = copy.deepcopy(model, {id(parameter): parameter for parameter in parameters})
        if double:
            filed = [p.register_post_accumulate_grad_hook(move_gradient) for p in parameters if p.requires_grad]
        yield made.double() if double else made
    finally:
        for handle in filed:
            handle.remove()
        for parameter, (own, grad) in zip(parameters, before, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(own)
            parameter.grad = grad


@torch.no_grad()
def move_gradient(parameter: nn.Parameter) -> None:
    """Move the gradient of a parameter to a file without a name, mapped: it ends with its last tensor."""
    grad = parameter.grad
    if grad.layout != torch.strided:
        return  # of an embedding's rows, which are few
    with tempfile.NamedTemporaryFile() as file:
        mapped = torch.from_file(file.name, shared=True, size=max(1, grad.numel()), dtype=grad.dtype)
    parameter.grad = mapped[: grad.numel()].view(grad.shape).copy_(grad)


#: :func:`copied` or :func:`lent`.
Copies = Callable[[nn.Module, bool], contextlib.AbstractContextManager[nn.Module]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Relative errors of one tensor against float64: ``norm(t - exact) / norm(exact)``."""

    tensor: str
    stock: float
    fused: float
    limit: float

    @property
    def agrees(self) -> bool:
        return self.fused <= self.limit  # false for NaN

    def __str__(self) -> str:
        return f"{self.tensor}: fused error {self.fused:.2e}, stock error {self.stock:.2e}, allowed {self.limit:.2e}"


def check(
    stock: nn.Module,
    fused: nn.Module,
    x: torch.Tensor,
    names: Iterable[str],
    autocast: torch.dtype | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
    copies: Copies = copied,
) -> list[Difference]:
    """Compare two models by all rules of this module. Neither is changed.

    Args:
        stock: the model as it was.
        fused: the same model, fused.
        x: input batch.
        names: modules of the model to compare by themselves too, each kind once.
        autocast: run both (but not the float64 reference) under autocast to this dtype.
        progress: told the fraction done.
        copies: how models are copied for a run, :func:`copied` or :func:`lent`.
    """
    found = compare([(stock, fused, x)], autocast, FLIP_ALLOWANCE, copies=copies)
    blocks = distinct_blocks(stock, names, x)
    for index, block in enumerate(blocks):
        progress((index + 1) / (len(blocks) + 1))
        pair = stock.get_submodule(block.name), fused.get_submodule(block.name)
        found += check_block(*pair, block, autocast, copies)
    return found


def check_block(
    stock: nn.Module, fused: nn.Module, block: Block, autocast: torch.dtype | None, copies: Copies = copied
) -> list[Difference]:
    """Compare one block by itself on pieces of its activations."""
    made = normalised(stock, block.example)
    elements = BLOCK_ELEMENTS * min(1.0, NORMALISED / made)
    trials = [(stock, fused, piece) for piece in pieces(block.example, elements)]
    decisions = made * trials[0][2].numel()
    of_trials = min if decisions > 2 * BLOCK_ELEMENTS * NORMALISED else statistics.median
    found = compare(trials, autocast, 0.0, of_trials, copies)
    return [dataclasses.replace(difference, tensor=f"{block.name}: {difference.tensor}") for difference in found]


@torch.no_grad()
def normalised(block: nn.Module, x: torch.Tensor) -> float:
    """How many values the batch norms of `block` make for each of its input: what ReLUs decide about.

    Of blocks that change the size of images 1: how small a crop they take is not known.
    """
    counts, block = [1e-9], copy.deepcopy(block)
    for module in block.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(lambda module, inputs, out: counts.append(out.numel() / x.numel()))
    return sum(counts) if block(x).shape[2:] == x.shape[2:] else 1.0


def pieces(x: torch.Tensor, elements: float = BLOCK_ELEMENTS) -> list[torch.Tensor]:
    """Crops of `x` of so many elements, each at another place, samples scaled a little, so that no two round alike."""
    generator = torch.Generator().manual_seed(0)
    n, c, h, w = x.shape
    edge = max(2, int((elements / (n * c)) ** 0.5))
    n = max(min(n, 2), min(n, int(elements / (c * edge**2))))
    crops = []
    for _ in range(BLOCK_TRIALS):
        top = int(torch.randint(max(1, h - edge + 1), (), generator=generator))
        left = int(torch.randint(max(1, w - edge + 1), (), generator=generator))
        scale = 0.8 + 0.4 * torch.rand(n, 1, 1, 1, generator=generator).to(x)
        crop = x[:n, :, top : top + edge, left : left + edge] * scale
        crops.append(crop.contiguous(memory_format=torch.channels_last))
    return crops


def compare(
    trials: list[tuple[nn.Module, nn.Module, torch.Tensor]],
    autocast: torch.dtype | None,
    gradient_allowance: float,
    of_trials: Callable[[Iterable[float]], float] = statistics.median,
    copies: Copies = copied,
) -> list[Difference]:
    """Errors over ``(stock, fused, input)`` trials of outputs, gradients and buffers, and what they may be."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for stock, fused, x in trials:
        exact = _of_copy(copies(stock, True), x.double(), None)
        sides = []
        for side in (stock, fused):  # one after the other: of each only the errors stay
            seen = _of_copy(copies(side, False), x, autocast)
            sides.append({name: error(seen.pop(name, None), t, scale_of(name, exact)) for name, t in exact.items()})
        for name in exact:
            errors.setdefault(name, []).append(tuple(side[name] for side in sides))
    floor = rounding_floor(autocast or trials[0][2].dtype)
    found = []
    for name, pairs in errors.items():
        stock_error, fused_error = (of_trials(column) for column in zip(*pairs, strict=True))
        allowance = floor + (gradient_allowance if name.startswith("gradient") else 0.0)
        found.append(Difference(name, stock_error, fused_error, FACTOR * stock_error + allowance))
    return found


def _of_copy(
    lending: contextlib.AbstractContextManager[nn.Module], x: torch.Tensor, autocast: torch.dtype | None
) -> Observed:
    with lending as model:
        return observe(model, x, autocast)


def rounding_floor(dtype: torch.dtype) -> float:
    """Relative error that any other order of operations may make: eight float32 roundings, or half a 16-bit one."""
    return max(8 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 2)


def observe(model: nn.Module, x: torch.Tensor, autocast: torch.dtype | None) -> Observed:
    """Outputs in training and evaluation, all gradients, and all buffers after one training step on `x`."""
    x = x.detach().requires_grad_()
    torch.manual_seed(0)  # dropout and its like draw the same
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        out = model.train()(x)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) / len(out)
    out.backward(cotangent)
    with torch.no_grad(), torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        evaluated = model.eval()(x)
    seen = {"output in training": out, "output in evaluation": evaluated, "gradient of the input": x.grad}
    seen |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    seen |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    return {name: tensor.detach() for name, tensor in seen.items() if tensor is not None}


def error(tensor: torch.Tensor | None, exact: torch.Tensor, scale: float = 0.0) -> float:
    """Distance by `scale`, or else relative; absolute where `exact` is zero; infinite where shapes differ."""
    if tensor is None or tensor.shape != exact.shape:
        return float("inf")
    scale = scale or exact.double().norm().item()
    return (tensor.double() - exact.double()).norm().item() / (scale or 1.0)


def scale_of(name: str, exact: Observed) -> float:
    """By what the error of a tensor is measured: its own norm.

    Behind a bias a batch norm subtracts it, so that the bias's exact gradient is zero and what is computed nothing but
    rounding: of the terms that make up the weight's gradient, by which it is measured then.
    """
    own = exact[name].double().norm().item()
    weight = exact.get(f"{name.removesuffix('bias')}weight") if name.startswith("gradient") else None
    beside = 0.0 if weight is None or not name.endswith("bias") else weight.double().norm().item()
    return beside if own < ZERO * beside else own


@torch.no_grad()
def scatter_norms(model: nn.Module) -> None:
    """Give every batch norm weights and biases as a trained model has, so that no branch starts at zero."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.weight.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            module.bias.copy_(0.1 * torch.randn(module.num_features, generator=generator))


def summary(found: list[Difference]) -> list[dict]:
    """Of every kind of tensor how many there are, and the one closest to its limit, as rows for a report."""
    rows = []
    for scope in ("whole model", "blocks"):
        for kind in ("output", "gradient", "buffer"):
            group = [d for d in found if _scope(d) == scope and d.tensor.rpartition(": ")[2].startswith(kind)]
            if group:
                worst = max(group, key=lambda d: d.fused / d.limit)
                rows.append({"scope": scope, "kind": kind, "tensors": len(group)} | dataclasses.asdict(worst))
    return rows


def _scope(difference: Difference) -> str:
    return "blocks" if ": " in difference.tensor else "whole model"
