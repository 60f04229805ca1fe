"""From a program to the steps that run it: all choices of how, made once for a program and a kind of input.

What a program may be is checked here too, so that the steps need not: a norm without ReLU is the operand of a sum or
ends the block, and the branch of a sum is such a norm, or a convolution, that nobody else reads.

Where :func:`resnet_fused.tune` has measured the variants of this very case, the cost model is not asked
(:mod:`.measured`). A kernel that is missing or failed its self-check, where ours would leave passes over activations to
the reference, makes another variant, or stock's operations.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..backends import tf32
from ..backends.cpu import LOOP_DTYPES
from ..backends.selfcheck import judge
from ..ops import DATA_DTYPES
from ..steps.activated import Activate
from ..steps.directions import Lowered
from ..steps.join import Join
from ..steps.kinds import Convolve, ConvolveAndAdd, Kind, Normalise, PooledNorm
from ..steps.program import Addition, Averaging, Call, Convolution, Node, Normalisation, Pooling, Program
from ..steps.value_join import ValueJoin
from ..steps.value_kinds import ConvolveTaps, ConvolveValue, ConvolveValueAdd
from . import average_steps, averages, choose, cpu_values, dense, gpu_values, measured, too_small, variants, words
from .gates import remakes
from .keys import threads
from .variants import Variant

Tensor = torch.Tensor


def obstacle(program: Program) -> str:
    """Why no steps can run `program`; empty if there are some."""
    for value, node in program.numbered:
        if any(not 0 <= read < value for read in node.reads):
            return f"node {value - program.inputs} reads a value that nobody made before it"
    readers = program.every_reader
    for value, node in program.numbered:
        if value < program.output and not readers[value]:
            return "a value that nobody reads"
        reason = _node_obstacle(program, value, node)
        if reason:
            return reason
    if program.inputs > 1 and program.readers(1) != (program.output,):
        return "a residual from outside that is not added last"
    if not program.nodes or isinstance(program.nodes[-1], Convolution):
        return "it does not end in a batch norm, an addition or a pool"
    return ""


def _node_obstacle(program: Program, value: int, node: Node) -> str:
    if isinstance(node, Addition):
        return _addition_obstacle(program, node)
    if isinstance(node, Averaging) and (reason := averages.obstacle(program, value, node)):
        return reason
    if program.is_affine(node.source):
        return "a batch norm without ReLU that something but an addition reads"
    if isinstance(node, Normalisation) and node.sampled and value != program.output:
        return "a factor for each sample within the block"
    if isinstance(node, Normalisation) and node.act is not None and (node.relu or node.sampled):
        return "an activation beside a ReLU or a factor for each sample"
    if isinstance(node, Pooling):
        alone = program.is_lazy(node.source) and program.readers(node.source) == (program.output,)
        return "" if alone else "a pool of something but a batch norm, or within the block"
    return ""


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
    if len(program.readers(node.other)) > 1:
        return "a shortcut's batch norm that is read elsewhere too"
    return "" if program.is_affine(node.branch) else "a shortcut in a batch norm, added to a convolution"


class _Chosen(NamedTuple):
    """A variant of a call."""

    variant: Variant
    gram: frozenset[int]  # the norms whose branches are Gram joins
    taps: frozenset[int]  # the convolutions by `conv_values`, where the 1x1 ops do not take them
    frozen: frozenset[int]  # the norms that are part of their convolution's launch, of `gram` too


def steps_of(call: Call, variant: Variant) -> Lowered:
    """The steps of `call` in a variant that :func:`variants.every` has.

    Raises:
        ValueError: no steps run its program.
    """
    program = call.program
    if variant.stock:
        return Lowered(program, None)
    if reason := obstacle(program):
        raise ValueError(f"no steps run this program: {reason}")
    main, projections = variants.gram_branches(call, variant.values)
    gram = (main if variant.gram else frozenset()) | (projections if variant.gram_shortcut else frozenset())
    taps = gpu_values.taps(call) if variant.taps else frozenset()
    frozen = gpu_values.frozen(call, variant.values) if variant.frozen else frozenset()
    chosen = _Chosen(variant, gram | frozen, taps, frozen)
    steps: list[Kind] = []
    for (value, node), own in zip(program.numbered, call.tensors, strict=True):
        steps += _steps_of_node(call, chosen, value, node, own)
    return Lowered(program, tuple(steps), not choose.on_gpu(call.x), remakes(program, steps[-1]))


def _on_value(call: Call, value: int) -> bool:
    """Whether the 1x1 ops take a convolution: with the addition that follows, without a stride, else without a bias."""
    node, own = call.program.maker(value), call.tensors[value - call.program.inputs]
    if _sum_of(call.program, value) is not None:
        return node.conv.is_pointwise(own.weight) and node.conv.stride == (1, 1)
    return variants.serves(node.conv, own)


def _sum_of(program: Program, value: int) -> int | None:
    """The sum that alone reads a convolution, as its branch."""
    readers = program.readers(value)
    node = program.maker(readers[0]) if len(readers) == 1 else None
    return readers[0] if isinstance(node, Addition) and node.branch == value else None


def _emits(call: Call, chosen: _Chosen, value: int) -> bool:
    """Whether the step that makes `value` emits its statistics if a norm that normalises with the batch reads it.

    What reads the output is not known here: likely a program like this one, if this one begins with such a norm.
    """
    program, node = call.program, call.program.maker(value)
    if isinstance(node, Convolution):
        return value in chosen.taps or (chosen.variant.values and _on_value(call, value))
    if not isinstance(node, Addition) or node.relu or not isinstance(program.maker(node.branch), Convolution):
        return False
    likely = 0 if value == program.output else value
    return program.meets_batch(likely) and not chosen.variant.values and _adds_with_statistics(call)


def _adds_with_statistics(call: Call) -> bool:
    """Whether a kernel adds and emits statistics in one pass: the CPU's."""
    place = choose.place_of(call.x)
    here = place is not None and place.type == "cpu" and call.program.backend in ("auto", "cpu")
    return here and call.x.dtype in LOOP_DTYPES and cpu_values.level() != ""


def _steps_of_node(call: Call, chosen: _Chosen, value: int, node: Node, own) -> list[Kind]:
    """The steps of the node that makes `value`; none where another's does it."""
    program, (variant, gram, taps, frozen), one_pass = call.program, chosen, chosen.variant.one_pass
    if isinstance(node, Averaging):
        on_load = variant.values and functools.partial(_on_value, call)
        return [average_steps.step(call, value, node, on_load or None)]
    if isinstance(node, Convolution):
        if averages.comes_first(call, call.shapes(), value):
            return []
        if _sum_of(program, value) is not None or not gram.isdisjoint(program.readers(value)):
            return []
        statistics = program.meets_batch(value)
        if variant.values and _on_value(call, value):
            return [ConvolveValue(value, statistics, one_pass)]
        if value in taps:
            return [ConvolveTaps(value, statistics)]
        return [Convolve(value, variant.keep and program.is_lazy(node.source), statistics)]
    if isinstance(node, Pooling):
        return [PooledNorm(value)]
    steps: list[Kind] = []
    if isinstance(node, Normalisation):
        emitted = node.norm.batch_stats and _emits(call, chosen, node.source)
        if node.act is not None:
            return [Activate(value, emitted)]
        if value not in gram:
            steps.append(Normalise(value, emitted))
        if value != program.output and not (node.relu and value in frozen):
            return steps
    terms = program.terms(value)
    if terms is None:
        on_value = variant.values and _on_value(call, node.branch)
        return [ConvolveValueAdd(value, one_pass) if on_value else ConvolveAndAdd(value, _emits(call, chosen, value))]
    if terms.branch in frozen:
        on_value = variant.values and functools.partial(_on_value, call)
        return [gpu_values.frozen_step(call, value, on_value or None, one_pass)]
    kinds = (terms.branch in gram, terms.other in gram)
    return [*steps, ValueJoin(value, *kinds, one_pass) if variant.values or taps else Join(value, *kinds)]


def lacking(lowered: Lowered, call: Call) -> str:
    """An op of `lowered` that would be left to the reference on a GPU; empty if there is none.

    On a CPU the reference may serve, and who forces a backend has chosen.
    """
    place = choose.place_of(call.x)
    if lowered.steps is None or lowered.program.backend != "auto" or (place is not None and place.type == "cpu"):
        return ""
    ops = tuple(dict.fromkeys(op for step in lowered.steps for op in step.ops(lowered.program)))
    return choose.lacking(ops, call.x)


def pools(call: Call) -> bool:
    """Whether there is a kernel here for the pool that `call` ends in."""
    x, backend = call.x, call.program.backend
    if not choose.on_gpu(x):
        here = x.device.type == "cpu" and choose.target() is None
        return here and backend in ("auto", "cpu") and cpu_values.level() != ""
    if x.dtype not in DATA_DTYPES:
        return False
    lowered = steps_of(call, Variant())
    own = lowered.steps[-1].ops(call.program)  # which the compiled kernels have, without Triton too
    there = choose.value_device(backend, x) is not None or not choose.lacking(own, x, backend)
    return there and not lacking(lowered, call)


def allowed(call: Call) -> list[Variant]:
    """Everything that `call` can be run as without the reference; last, stock."""
    found = [variant for variant in variants.every(call) if not lacking(steps_of(call, variant), call)]
    return found + ([Variant(stock=True)] if call.program.backend == "auto" else [])


def _sound(call: Call, variant: Variant) -> tuple[Variant, Lowered, str]:
    """`call` in this variant, or in the next best that leaves nothing to the reference, and what the first lacked."""
    lowered = steps_of(call, variant)
    missing = lacking(lowered, call)
    if not missing:
        return variant, lowered, ""
    two, written = {"one_pass": False}, {"gram": False, "gram_shortcut": False}
    on_tensors = written | two | {"keep": False, "values": False}
    lesser: list[dict] = [two, written, written | two, on_tensors] if variant.values else []
    lesser += [less | {"taps": False} for less in ({}, *lesser)] if variant.taps else []
    lesser += [less | {"frozen": False} for less in ({}, *lesser)] if variant.frozen else []
    for less in lesser:
        other = steps_of(call, variant._replace(**less))
        if not lacking(other, call):
            return variant._replace(**less), other, missing
    return Variant(stock=True), Lowered(call.program, None), missing


def decided_by(call: Call) -> tuple | None:
    """All that :func:`lower` depends on but the program, to keep its result by; None where it must be asked each time.

    That is where somebody measures or observes the choices, and for tensors that stand for others.
    """
    x = call.x
    asked = bool(choose.observers) or choose.tuner() is not None or torch.compiler.is_compiling()
    if asked or type(x) not in (Tensor, torch.nn.Parameter):
        return None
    weights = [(own.weight.shape, own.bias is None) for own in call.tensors if own.weight is not None]
    seen = choose.target(), choose.fuses_all(), threads(), tf32.allowed(), judge.count_of_changes(), measured.changes()
    return x.shape, x.dtype, x.device, call.sample_factor is None, *seen, *weights


def lower(call: Call) -> Lowered:
    """How `call` runs; its tensors are in the dtypes that they are used in."""
    return decide(call)[1]


def decide(call: Call) -> tuple[Variant, Lowered]:
    """The variant of `call` that is taken, and its steps."""
    shapes = call.shapes()
    if not fits(call.program, shapes):
        return Variant(stock=True), Lowered(call.program, None)
    if call.program.dense:
        lowered, why = dense.lower(call)
        choose.tell(f"{words.of_steps(lowered)} ({why})" if why else words.of_steps(lowered))
        return Variant(stock=lowered.steps is None), lowered
    tuner, variant, why = choose.tuner(), None, "measured"
    if tuner is not None:
        variant = tuner(call)
    elif choose.target() is None and call.program.prefer == "speed":
        variant = measured.recall(call, allowed)
    if variant is None:
        variant = variants.modelled(call, shapes)
        why = words.why(call, shapes) if choose.observers else ""
    variant, lowered, missing = _sound(call, variant)
    if choose.observers:
        why = f"no sound kernel of {missing}" if missing else why
        choose.tell(f"{words.of_steps(lowered)} ({why})")
    return variant, lowered


def fits(program: Program, shapes: list[torch.Size]) -> bool:
    """Whether every value has elements, and batch norm more than one a channel; and what is added, one shape.

    Where not, stock says what is wrong, or broadcasts.
    """
    for value, node in program.numbered:
        if any(size <= 0 for size in shapes[value][2:]):
            return False
        if isinstance(node, Normalisation) and node.norm.batch_stats and too_small.pixels(shapes[value]) == 1:
            return False
        if isinstance(node, Addition) and shapes[node.branch] != shapes[node.other]:
            return False
    return True
