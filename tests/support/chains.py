"""Post-activation blocks with tensors of their own, in a given variant, and their comparison with stock in float64."""

import dataclasses
from typing import NamedTuple

import torch

from resnet_fused.plan.lower import steps_of
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import Call, Conv, Norm, Pool, StepTensors, residual_program
from resnet_fused.steps.program import Convolution, Normalisation
from resnet_fused.steps.program_node import run_program
from resnet_fused.steps.stock import program_output

F64 = torch.float64


class Step(NamedTuple):
    """One convolution and the batch norm behind it."""

    conv: Conv
    norm: Norm


@dataclasses.dataclass(frozen=True)
class Chain:
    """``conv-bn-relu`` for all `steps` but the last, then ``conv-bn (+ residual) (-> relu) (-> pool)``; its variant.

    Its tensors are one :class:`StepTensors` for each step, with those of both of its nodes, the shortcut's last.
    """

    steps: tuple[Step, ...]
    shortcut: Step | None = None
    relu: bool = True
    pool: Pool | None = None
    identity: bool = False  # whether its input is the residual
    backend: str = "auto"
    values: bool = False
    gram: bool = False
    gram_shortcut: bool = False
    keep: bool = False
    one_pass: bool = False
    taps: bool = False
    frozen: bool = False
    stock: bool = False

    @property
    def variant(self):
        return Variant(*(getattr(self, name) for name in Variant._fields))


def call_of(chain, x, tensors, residual=None, factor=None):
    """`chain` as what the plan and the node take."""
    kind = "x" if chain.identity or residual is x else "" if residual is None else "tensor"
    program = residual_program(
        list(chain.steps),
        chain.shortcut,
        residual=kind,
        relu=chain.relu,
        sampled=factor is not None,
        pool=chain.pool,
        backend=chain.backend,
    )
    return Call(program, x, node_tensors(program, tensors), residual if kind == "tensor" else None, factor)


def node_tensors(program, tensors):
    """The tensors of each node."""
    found, remaining = [], iter(tensors)
    for node in program.nodes:
        if isinstance(node, Convolution):
            own = next(remaining)
            found.append(StepTensors(own.weight, own.bias))
        elif isinstance(node, Normalisation):
            found.append(own._replace(weight=None, bias=None))
        else:
            found.append(StepTensors(None))
    return found


def run_chain(chain, x, tensors, residual=None, factor=None):
    call = call_of(chain, x, tensors, residual, factor)
    return run_program(steps_of(call, chain.variant), call)


def chain_output(chain, x, residual, factor, tensors, moves=False):
    """By stock operations."""
    return program_output(call_of(chain, x, tensors, residual, factor), moves)


def make_step(inputs, outputs, kernel=1, *, batch_stats=True, bias=False, stride=1, groups=1):
    def leaf(*shape):
        return torch.randn(*shape, dtype=F64, requires_grad=True)

    tensors = StepTensors(
        leaf(outputs, inputs // groups, kernel, kernel),
        leaf(outputs) if bias else None,
        leaf(outputs),
        leaf(outputs),
        torch.randn(outputs, dtype=F64),
        torch.rand(outputs, dtype=F64) + 0.5,
        torch.tensor(0),
    )
    conv = Conv((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    return Step(conv, Norm(batch_stats=batch_stats)), tensors


def differences(chain, x, tensors, residual=None, factor=None):
    """Largest difference from stock in the output and in the gradient of every input, by name."""
    leaves = {"x": x}
    if residual is not None and residual is not x:
        leaves["residual"] = residual
    for i, step in enumerate(tensors):
        leaves |= {f"{name}{i}": t for name, t in step._asdict().items() if t is not None and t.requires_grad}
    out, expected = run_chain(chain, x, tensors, residual, factor), chain_output(chain, x, residual, factor, tensors)
    cotangent = torch.randn_like(out)
    got = torch.autograd.grad(out, list(leaves.values()), cotangent)
    want = torch.autograd.grad(expected, list(leaves.values()), cotangent)
    found = {name: (a - b).abs().max().item() for name, a, b in zip(leaves, got, want, strict=True)}
    return found | {"out": (out - expected).abs().max().item()}


def assert_equal(*args):
    wrong = {name: value for name, value in differences(*args).items() if not value < 1e-10}
    assert not wrong
