"""Is a fused model the stock model? Both against the stock model in float64, every output and every gradient.

The rule: the fused error is at most twice stock's own error in the same dtype, plus a few roundings.

A ReLU is a decision. Where an input of one is closer to zero than the rounding error, two correct programs may decide
differently, and in a deep network one such flip moves all gradients before it by a percent. Two runs of *stock*
ResNet-50, one channels_last and one not, differ that way by factors up to 10,000 in their gradient errors. So the rule
is applied where it means something:

* outputs and running statistics, which are continuous: on the model as it is;
* gradients: on the model with its norms shifted so that every ReLU is decided well beyond rounding
  (:func:`decide_relus`);
* gradients on the model as it is: with :data:`FLIP_ALLOWANCE` on top, which is far below what a wrong term costs.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

FACTOR = 2.0
#: Roundings that any order of operations may add, in units of the dtype's epsilon, relative to the tensor's norm.
FLOOR = 8
#: What flipped ReLUs may cost a gradient, relative to its norm.
FLIP_ALLOWANCE = 0.05
#: Distance of a decided ReLU's input from zero, in standard deviations.
DECIDED = 4.0


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

    @property
    def ratio(self) -> float:
        """Fused error in units of stock's."""
        return self.fused / self.stock if self.stock else (float("inf") if self.fused else 1.0)

    def __str__(self) -> str:
        return f"{self.tensor}: fused error {self.fused:.2e}, stock error {self.stock:.2e}, allowed {self.limit:.2e}"


def check(stock: nn.Module, fused: nn.Module, x: torch.Tensor, autocast: torch.dtype | None = None) -> list[Difference]:
    """Compare both models with stock in float64: all rules of this module. Neither model is changed.

    Args:
        stock: the model as it was; its norms must be those that `fused` has.
        fused: the same model, fused.
        x: input batch.
        autocast: run both (but not the float64 reference) under autocast to this dtype.
    """
    found = compare(stock, fused, x, autocast, gradient_allowance=FLIP_ALLOWANCE)
    decided = copy.deepcopy(stock)
    decide_relus(decided)
    fused = copy.deepcopy(fused)
    fused.load_state_dict(decided.state_dict())
    strict = compare(decided, fused, x, autocast)
    return found + [dataclasses.replace(d, tensor=f"{d.tensor} (decided ReLUs)") for d in strict]


def compare(
    stock: nn.Module,
    fused: nn.Module,
    x: torch.Tensor,
    autocast: torch.dtype | None = None,
    gradient_allowance: float = 0.0,
) -> list[Difference]:
    """Errors of all outputs, gradients and buffers on one input, each with what it is allowed."""
    exact = observe(copy.deepcopy(stock).double(), x.double(), None)
    ours = observe(copy.deepcopy(fused), x, autocast)
    theirs = observe(copy.deepcopy(stock), x, autocast)
    eps = torch.finfo(autocast or x.dtype).eps
    found = []
    for name, expected in exact.items():
        stock_error, fused_error = error(theirs[name], expected), error(ours.get(name), expected)
        allowance = FLOOR * eps + (gradient_allowance if name.startswith("gradient") else 0.0)
        found.append(Difference(name, stock_error, fused_error, FACTOR * stock_error + allowance))
    return found


def observe(model: nn.Module, x: torch.Tensor, autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Outputs in training and evaluation, all gradients, and all buffers after one training step on `x`."""
    x = x.detach().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        torch.manual_seed(0)  # dropout and its like draw the same
        out = model.train()(x)
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) / len(out)
        out.backward(cotangent)
        with torch.no_grad():
            evaluated = model.eval()(x)
    seen = {"output in training": out, "output in evaluation": evaluated, "gradient of the input": x.grad}
    seen |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    seen |= {f"buffer {name}": b for name, b in model.named_buffers()}
    return {name: tensor.detach() for name, tensor in seen.items() if tensor is not None}


def error(tensor: torch.Tensor | None, exact: torch.Tensor) -> float:
    """Relative distance; absolute where `exact` is zero; infinite where the tensor is missing or has another shape."""
    if tensor is None or tensor.shape != exact.shape:
        return float("inf")
    scale = exact.double().norm().item()
    return (tensor.double() - exact.double()).norm().item() / (scale or 1.0)


@torch.no_grad()
def decide_relus(model: nn.Module) -> None:
    """Shift every batch norm by several standard deviations: even channels up, odd channels down.

    The input of each ReLU is then far from zero, also after residual adds, which add channel to equal channel. About
    one in ten thousand inputs in an even channel is still negative.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            channels = torch.arange(module.num_features)
            side = 1 - 2 * (channels % 2)
            bias = side * DECIDED * (0.9 + 0.2 * torch.rand(len(channels), generator=generator))
            module.bias.copy_(bias)
            module.weight.copy_(0.5 + 0.5 * torch.rand(len(channels), generator=generator))


def scatter_norms(model: nn.Module) -> None:
    """Give every batch norm weights and biases as a trained model has, so that no branch starts at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.weight.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                module.bias.copy_(0.1 * torch.randn(module.num_features, generator=generator))


def summary(found: list[Difference]) -> list[dict]:
    """The worst tensor of every kind, as rows for a report."""
    rows = []
    for kind in ("output in training", "output in evaluation", "gradient", "buffer"):
        for decided in (False, True):
            group = [d for d in found if d.tensor.startswith(kind) and d.tensor.endswith(" ReLUs)") == decided]
            if group:
                worst = max(group, key=lambda d: d.fused / d.limit if d.limit else float("inf"))
                rows.append({"kind": kind + " (decided ReLUs)" * decided, "tensors": len(group)} | worst_of(worst))
    return rows


def worst_of(difference: Difference) -> dict:
    """A difference as a row."""
    return dataclasses.asdict(difference) | {"agrees": difference.agrees}
