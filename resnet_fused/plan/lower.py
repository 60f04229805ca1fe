"""From a program to the steps that run it: all choices of how, made once for a program and a kind of input.

What a program may be is checked here too, so that the steps need not: a norm without ReLU is an addition's operand, and
an addition's branch is such a norm, or a convolution that nobody else reads.
"""

from __future__ import annotations

import functools

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import soundness
from ..backends.selfcheck import judge
from ..steps.kinds import Convolve, ConvolveAndAdd, Join, Kind, Normalise
from ..steps.program import Addition, Convolution, Normalisation, Program
from ..steps.program_node import Lowered
from ..steps.spec import StepTensors
from ..steps.value_kinds import ConvolveValue, ConvolveValueAdd
from . import choose, too_small, words
from .keys import threads

Tensor = torch.Tensor


def obstacle(program: Program) -> str:
    """Why no steps can run `program`; empty if there are some."""
    for value, node in enumerate(program.nodes, 1):
        if any(not 0 <= read < value for read in node.reads):
            return f"node {value - 1} reads a value that nobody made before it"
        if value < len(program.nodes) and not program.readers(value):
            return "a value that nobody reads"
        if isinstance(node, Addition):
            reason = _addition_obstacle(program, node)
            if reason:
                return reason
        for read in node.reads:
            if not isinstance(node, Addition) and program.is_affine(read):
                return "a batch norm without ReLU that something but an addition reads"
    last = program.nodes[-1] if program.nodes else None
    return "" if isinstance(last, Addition) else "it does not end in an addition"


def _addition_obstacle(program: Program, node: Addition) -> str:
    if node.branch == node.other:
        return "an addition of a value to itself"
    branch = program.maker(node.branch)
    if not (isinstance(branch, Convolution) or program.is_affine(node.branch)):
        return "an addition to something that is neither a convolution nor a batch norm"
    if len(program.readers(node.branch)) > 1:
        return "an addition to something that is read elsewhere too"
    if not program.is_affine(node.other):
        return ""
    return "" if program.is_affine(node.branch) else "a shortcut in a batch norm, added to a convolution"


@functools.lru_cache(maxsize=512)
def steps_of(program: Program, on_values: frozenset[int] = frozenset()) -> Lowered:
    """The steps of `program`. `on_values`: the values whose convolutions the 1x1 ops take."""
    if reason := obstacle(program):
        raise ValueError(f"no steps run this program: {reason}")
    steps: list[Kind] = []
    for value, node in enumerate(program.nodes, 1):
        if isinstance(node, Convolution):
            readers = program.readers(value)
            adds = [program.maker(reader) for reader in readers if isinstance(program.maker(reader), Addition)]
            if any(add.branch == value for add in adds):
                continue
            statistics = any(isinstance(program.maker(reader), Normalisation) for reader in readers)
            steps.append(ConvolveValue(value, statistics) if value in on_values else Convolve(value))
        elif isinstance(node, Normalisation):
            steps.append(Normalise(value))
        elif node.branch in on_values and program.maker(node.branch).conv.stride == (1, 1):
            steps.append(ConvolveValueAdd(value))
        elif isinstance(program.maker(node.branch), Convolution):
            steps.append(ConvolveAndAdd(value))
        else:
            steps.append(Join(value))
    return Lowered(program, tuple(steps))


def flops(program: Program, shapes: list[torch.Size], tensors: list[StepTensors]) -> int:
    """Of the convolutions, forward and both gradients."""
    found = 0
    for shape, own in zip(shapes[1:], tensors, strict=True):
        if own.weight is not None:
            found += 6 * own.weight.numel() * shape[0] * shape[2] * shape[3]
    return found


def stock_bytes(program: Program, shapes: list[torch.Size], itemsize: int) -> int:
    """What stock saves for backward: what convolutions and norms read, and what ReLUs made."""
    saved = set()
    for value, node in enumerate(program.nodes, 1):
        if not isinstance(node, Addition):
            saved |= set(node.reads)
        if not isinstance(node, Convolution) and node.relu:
            saved.add(value)
    return sum(shapes[value].numel() for value in saved) * itemsize


def is_small(program: Program, x: Tensor, shapes: list[torch.Size], tensors: list[StepTensors]) -> bool:
    """Whether stock's operations are expected to be faster, as :mod:`.too_small` tells it of a chain."""
    if choose.fuses_all() or not too_small.HAS_AVX512 or program.backend != "auto":
        return False
    saved = stock_bytes(program, shapes, x.element_size())
    return too_small.stays_in_cache(saved, flops(program, shapes, tensors), x.dtype)


def decided_by(x: Tensor) -> tuple | None:
    """What of an input and of all settings :func:`lower` depends on, beside the program and shapes of weights.

    None: nothing may be kept, as somebody plans for a device that is not there, or listens.
    """
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or choose.is_asked():
        return None
    return x.shape, x.dtype, x.device, choose.fuses_all(), threads(), judge.count_of_changes()


def lower(program: Program, x: Tensor, tensors: list[StepTensors]) -> Lowered | None:
    """How `program` runs on `x`; None: as stock. `tensors`: of each node, in the dtypes that they are used in."""
    shapes = program.shapes(x.shape, tensors)
    if any(size <= 0 for shape in shapes for size in shape[2:]) or not _adds_fit(program, shapes):
        return None  # stock says what is wrong, or broadcasts
    if any(isinstance(n, Normalisation) and _values(shapes[v]) <= 1 for v, n in enumerate(program.nodes, 1)):
        return None
    lowered, why = _on_gpu(program, x, tensors) if choose.on_gpu(x) else _on_cpu(program, x, shapes, tensors)
    for observer in choose.observers:
        observer(f"stock ({why})" if lowered is None else words.of_steps(lowered))
    return lowered


def _on_cpu(program: Program, x: Tensor, shapes, tensors) -> tuple[Lowered | None, str]:
    """Everything on tensors; a sum is a pass of its own, in place."""
    if is_small(program, x, shapes, tensors):
        return None, "stays in the cache"
    return steps_of(program), ""


def _on_gpu(program: Program, x: Tensor, tensors: list[StepTensors]) -> tuple[Lowered | None, str]:
    """1x1 convolutions on values, others through cuDNN on tensors; nothing of it by the reference."""
    if choose.value_device(program.backend, x) is None:
        return None, "no kernels that normalise on load"
    on_values = frozenset(
        value
        for value, (node, own) in enumerate(zip(program.nodes, tensors, strict=True), 1)
        if isinstance(node, Convolution) and _takes_values(program, value, node, own)
    )
    lowered = steps_of(program, on_values)
    ops = tuple(sorted({op for step in lowered.steps for op in type(step).ops}))
    missing = (
        ""
        if program.backend != "auto"
        else soundness.lacking(ops, x.dtype, choose.place_of(x), not isinstance(x, FakeTensor))
    )
    return (None, f"no sound kernel of {missing}") if missing else (lowered, "")


def _takes_values(program: Program, value: int, node: Convolution, own: StepTensors) -> bool:
    """Whether the 1x1 ops take a convolution: a bias can only be added where an addition follows."""
    adds = all(isinstance(program.maker(reader), Addition) for reader in program.readers(value))
    return node.conv.is_pointwise(own.weight) and (own.bias is None or (adds and node.conv.stride == (1, 1)))


def _values(shape: torch.Size) -> int:
    """Values a channel."""
    return shape[0] * shape[2] * shape[3]


def _adds_fit(program: Program, shapes: list[torch.Size]) -> bool:
    return all(shapes[n.branch] == shapes[n.other] for n in program.nodes if isinstance(n, Addition))
