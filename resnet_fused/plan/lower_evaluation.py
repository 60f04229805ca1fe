"""From a program to its steps in evaluation: who carries batch norm, sum and ReLU, for the CPU and for GPUs.

On a CPU every convolution does, each by the kernel that is fastest for it:

* `conv_norm_add_relu` with the weight as it is, whose epilogue has norm, sum and ReLU: of a 1x1 in float32
  (:func:`.unfolded.pays`), and of all, where pixels are few (:data:`FEW`) and reading the weights is what takes time. A
  folded weight is one more to read at every call, since its origin must be compared.
* `winograd_conv3x3_add_relu` of a 3x3 that minimal filtering makes faster (:func:`.winograd.folded`).
* `conv_norm_relu_pool` of a stem, a convolution of few channels with norm, ReLU and max pool behind it
  (:func:`.stem.pools`): all of that in one pass over the image, with the weight as it is.
* oneDNN's of all others: the norm that alone reads one is in its weight, the sum that alone reads that, and the ReLU,
  in its epilogue.

What is too small to gain by any is stock's (:func:`.too_small.is_small_in_evaluation`).

On a GPU, nothing is folded into weights and nothing is kept between calls: scale and shift of each batch norm are made
from the running statistics at every call, by one small kernel, so a write through ``.data`` or between two replays of a
CUDA graph is seen. A program becomes:

* Convolutions without groups, where the compiled library is: `conv_norm_add_relu`, one launch for each with bias, batch
  norm, sum and ReLU in it, if that moves no more than what follows does. A program of nothing else is one call,
  `conv_chain`, in which a 1x1 projection is part of the 1x1 convolution's launch that adds it.
* 1x1 convolutions of stride 1: `conv1x1_join`, whose epilogue scales, shifts, adds and clamps the float32 accumulator;
  with a 1x1 projection in the same kernel. A norm before them is applied on load.
* Other convolutions: ATen's, written raw. `norm_add_relu` normalises in one pass, with the sum behind it, or
  `norm_relu_pool` does, at the end of a stem.

Beside stock (a launch for each convolution, batch norm, ReLU and sum) that moves less and is never a launch more; a
norm with nothing behind it, where it would be one, is stock's. Not taken: ATen's fused ``cudnn_convolution_relu``. It
hands cuDNN its own uninitialised output as a summand with a factor of 0, one more read and, where that memory held NaN,
perhaps NaN; and it wants folded weights.

Where a kernel is missing or failed its self-check, the program does with the others, or is stock's operations.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import backends, onednn, soundness, tf32
from ..ops import stat_dtype
from ..steps import stem, unfolded, winograd
from ..steps.evaluation_flow import ForwardStep, Lowered
from ..steps.evaluation_kinds import NormValue
from ..steps.gpu_evaluation_kinds import Chain, CompiledConvolution, Product, chained
from ..steps.program import Addition, Call, Convolution, Normalisation
from . import averages, choose, gpu_values, too_small, words
from .evaluation_steps import Steps, carries_sum
from .keys import threads

Tensor = torch.Tensor


#: Pixels of a convolution's output up to which the weight is read as it is. Measured on an EPYC with AVX-512: at 16 the
#: op takes 0.87 to 1.26 of oneDNN's packed convolution and the checksum of its weight, at 4 to 1 0.5 to 0.8, at 49 1.7.
FEW = 16


def takes(call: Call) -> bool:
    """Whether evaluation can run a call: with running statistics alone, and no factor for each sample."""
    return call.sample_factor is None and not call.program.batch_stats


def lower(call: Call) -> Lowered | None:
    """How the program runs; None: as stock."""
    if not takes(call):
        raise ValueError("evaluation takes no batch statistics and no factor for each sample")
    reason = _obstacle(call)
    if reason:
        lowered, note = None, f"stock ({reason})"
    else:
        lowered, note = (_on_gpu if choose.on_gpu(call.x) else _on_cpu)(call)
    choose.tell(note)
    return lowered


def _on_cpu(call: Call) -> tuple[Lowered | None, str]:
    few, auto = _are_few(call), call.program.backend == "auto"
    if not few and auto and call.x.device.type == "cpu" and call.x.dtype not in onednn.SERVED:
        return None, "stock (no convolution with an epilogue there)"  # nothing to gain by folding at every call
    chooses = auto and not choose.fuses_all() and choose.target() is None
    if chooses and too_small.is_small_in_evaluation(call, call.shapes(), few):
        return None, "stock (too small to gain)"
    chosen = {} if few else {"filtered": _filtered(call), "unfolded": _unfolded(call), "stems": _stems(call)}
    lowered = Steps(call.program, few=few, whole=averages.whole(call), **chosen).lowered()
    missing = _lacking(call, lowered, call.x.device)
    return (None, f"stock (no sound kernel of {missing})") if missing else (lowered, words.of_evaluation(lowered))


def _filtered(call: Call) -> dict[int, int]:
    """The convolutions that minimal filtering makes faster, and the outputs of its tiles to a side."""
    program, shapes, found = call.program, call.shapes(), {}
    if call.x.dtype != torch.float32 or program.backend not in ("auto", "cpu"):
        return found
    for value, node, own in call.convolutions:
        if own.weight.dtype == torch.float32:
            outputs, _ = winograd.folded(shapes[node.source], own.weight, node.conv, program.precision, threads())
            found |= {value: outputs} if outputs else {}
    return found


def _stems(call: Call) -> frozenset[int]:
    """The convolutions of few channels whose norm, ReLU and max pool can be in one pass with them."""
    x, program = call.x, call.program
    if x.dtype != torch.float32 or program.backend not in ("auto", "cpu") or not _is_of_one_dtype(call):
        return frozenset()
    return frozenset(value for value, node, own in call.convolutions if stem.pools(own.weight, node.conv))


def pools(call: Call) -> bool:
    """Whether a CPU has the pool that `call` ends in in one pass with the convolution before."""
    last = call.program.nodes[-1]
    return not _are_few(call) and Steps(call.program, stems=_stems(call)).stem(last.source) is not None


def _is_of_one_dtype(call: Call) -> bool:
    """Whether all parameters have the dtype of the activations."""
    return all(t is None or t.dtype == call.x.dtype for own in call.tensors for t in own[:6])


def _unfolded(call: Call) -> frozenset[int]:
    """The convolutions that are fastest with the weight as it is."""
    program, x = call.program, call.x
    if x.dtype != torch.float32 or program.backend not in ("auto", "cpu") or not unfolded.IS_FAST:
        return frozenset()
    found, shapes = set(), call.shapes()
    for value, node, own in call.convolutions:
        norms = [call.tensors[reader - program.inputs] for reader in program.readers(value)]
        dtypes = {t.dtype for each in (own, *norms) for t in each[:6] if t is not None}
        if dtypes == {torch.float32} and unfolded.pays(own.weight, node.conv, too_small.pixels(shapes[value])):
            found.add(value)
    return frozenset(found)


def _are_few(call: Call) -> bool:
    """Whether all convolutions have so few pixels that their weights are best read as they are."""
    x, shapes = call.x, call.shapes()
    if x.dtype not in (torch.float32, torch.float64) or call.program.backend not in ("auto", "cpu"):
        return False
    if not _is_of_one_dtype(call):
        return False
    convolutions = [(value, node) for value, node in call.program.numbered if isinstance(node, Convolution)]
    return all(node.conv.groups == 1 and too_small.pixels(shapes[value]) <= FEW for value, node in convolutions)


def _obstacle(call: Call) -> str:
    """Why stock must run a program: it says what is wrong, or broadcasts, or adds what no step does."""
    program, shapes = call.program, call.shapes()
    if any(size <= 0 for shape in shapes for size in shape[2:]):
        return "an image too small for it"
    if call.residual is not None and call.residual.shape != shapes[1]:
        return "a residual of another shape"
    for node in program.nodes:
        if isinstance(node, Addition):
            if shapes[node.branch] != shapes[node.other]:
                return "a sum of two shapes"
            if not carries_sum(program, node.branch):
                return "a sum of what is neither a convolution nor a batch norm"
    return ""


def _on_gpu(call: Call) -> tuple[Lowered | None, str]:
    """The best steps whose kernels are all sound here; where a backend is forced, the best that it has."""
    program, whole, place = call.program, averages.whole(call), choose.place_of(call.x)
    pointwise = {
        value: "zeros" if own.bias is None else "cast" if own.bias.dtype != stat_dtype(call.x.dtype) else ""
        for (value, node), own in zip(program.numbered, call.tensors, strict=True)
        if isinstance(node, Convolution) and node.conv.is_pointwise(own.weight)
    }
    joins = program.backend == "auto" or "conv1x1_join" in backends()[program.backend].kernels
    if not joins or (choose.compiled_alone(program.backend, call.x) and not gpu_values.ones_fit(call)):
        pointwise = {}
    lowered = Steps(program, pointwise, whole=whole).lowered()
    compiled = _compiled(call, whole, place)
    if compiled is not None and _cost(call, compiled) <= _cost(call, lowered) and not _lacking(call, compiled, place):
        return compiled, words.of_evaluation(compiled)
    missing = found = _lacking(call, lowered, place)
    if missing == "conv1x1_join":
        lowered = Steps(program, {}, whole=whole).lowered()
        found = _lacking(call, lowered, place)
    if found and compiled is not None and not _lacking(call, compiled, place):
        return compiled, words.of_evaluation(compiled)
    lacks = f" (no sound kernel of {missing})" if missing else ""
    return (None, f"stock{lacks}") if found else (lowered, f"{words.of_evaluation(lowered)}{lacks}")


def _compiled(call: Call, whole: frozenset[int], place: torch.device | None) -> Lowered | None:
    """The steps with the compiled convolution for all that it takes; None where it takes none."""
    program, x = call.program, call.x
    if program.backend != "auto" and "conv_norm_add_relu" not in backends()[program.backend].kernels:
        return None
    if x.dtype == torch.float32 and not tf32.allowed():
        return None
    taken = set()
    for value, _, own in call.convolutions:
        norms = [call.tensors[reader - program.inputs] for reader in program.readers(value)]
        vectors = [own.bias, *(t for norm in norms for t in norm[1:6])]
        if all(t is None or t.dtype == stat_dtype(x.dtype) for t in vectors) and gpu_values.fits(call, value):
            taken.add(value)
    lowered = Steps(program, {}, unfolded=frozenset(taken), whole=whole).lowered() if taken else None
    return None if lowered is None else _in_one_call(call, lowered, place)


def _in_one_call(call: Call, lowered: Lowered, place: torch.device | None) -> Lowered:
    """Compiled convolutions that are all of a program as one call, where there are kernels of that."""
    name, checks = call.program.backend, not isinstance(call.x, FakeTensor)
    if len(lowered.steps) < 2 or not all(isinstance(step, CompiledConvolution) for step in lowered.steps):
        return lowered
    chain = chained(lowered, {value: own.weight.shape for value, _, own in call.convolutions})
    ops = ("conv_chain", "conv1x1_join") if chain.steps[0].joined else ("conv_chain",)  # by whose kernel it is launched
    if name == "auto":
        lacks = soundness.lacking(ops, call.x.dtype, place, checks)
    else:
        lacks = not backends()[name].kernels.keys() >= set(ops)
    return lowered if lacks else chain


def _cost(call: Call, lowered: Lowered) -> tuple[int, int]:
    """Elements of activations that steps read and write, and how many launches they are."""
    sizes = [shape.numel() for shape in call.shapes()]
    chains = [step for step in lowered.steps if isinstance(step, Chain)]
    unwritten = [value for chain in chains for value in chain.joined]
    moved, launches = -2 * sum(sizes[value] for value in unwritten), -len(unwritten)
    for step in _each(lowered):
        value = isinstance(step, NormValue)  # is of vectors alone
        moved += 0 if value else sizes[step.value] + sum(sizes[read] for read in step.reads)
        launches += 1 + (isinstance(step, Product) and sum(p is not None and p.norm is not None for p in step.parts))
    return moved, launches


def _each(lowered: Lowered) -> list[ForwardStep]:
    """The steps, those of chains one by one."""
    return [link for step in lowered.steps for link in (step.links if isinstance(step, Chain) else (step,))]


def _lacking(call: Call, lowered: Lowered, place: torch.device | None) -> str:
    """The op for want of whose sound kernel the steps are not to be run; empty if there is none."""
    program, checks = call.program, not isinstance(call.x, FakeTensor)
    if program.backend != "auto":
        return ""
    if choose.on_gpu(call.x):
        behind = {step.main.norm for step in _each(lowered) if isinstance(step, CompiledConvolution)}
        for (value, node), own in zip(program.numbered, call.tensors, strict=True):
            norm = isinstance(node, Normalisation) and value not in behind
            if norm and soundness.lacking(("running_affine",), own.running_mean.dtype, place, checks):
                return "running_affine"
    ops = sorted({op for step in lowered.steps for op in step.ops})
    return soundness.lacking(tuple(ops), call.x.dtype, place, checks) if ops else ""
