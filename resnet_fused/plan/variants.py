"""What a program can be run as: on values or on tensors, with written joins or Gram joins; and what the model expects.

*On values* where the 1x1 kernels that apply normalisation on load run: on GPUs Triton's, or the compiled ones where
these are forced or Triton is not there, and on CPUs where :mod:`.cpu_values` says so. Other programs are on tensors: on
a CPU, where Gram joins go through oneDNN, and on GPUs whose kernels of 1x1 convolutions are none of these, where they
go through the compiled convolutions. On GPUs all other convolutions are on values too where :mod:`.gpu_values` says so.

In 16 bits the gradients of narrow convolutions come from one pass, which moves fewer bytes and multiplies as much.

Which join, a cost model tells: what the two do differently. Writing z, its passes forward and backward cost bytes; the
Gram matrix, its correction of the gradient and the small matrix products cost FLOPs::

    plain: passes over z beyond the convolutions: write, statistics, normalise; sums, apply (2 reads, 1 write): 7
           lazy: write, normalise; sums (of z and of the gradient); on load in two products: 6
    gram:  M*C*(C+1) + 2*M*C*C for the Gram matrix and the correction, 4 products of [K, C] and [C, C] (lazy: 2.5, as
           only half of the symmetric one is computed),
           1 more read of the input, and an add for the correction's write (lazy: that is an epilogue)

The Gram join also saves the bytes of z between forward and backward, the reason it exists: it is taken unless the model
expects it to be slower by more than :data:`TOLERATED`, or :data:`TOLERATED_LAZY`, of the last convolution's time.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from ..backends import onednn
from ..ops import stat_dtype
from ..steps import pointwise
from ..steps.program import Addition, Call, Convolution, Normalisation, Pooling, Program, Terms
from ..steps.spec import Conv, StepTensors
from . import choose, cpu_values, gpu_values, too_small
from .devices import CPU_CORE, Device

#: Share of the last convolution's forward and backward time that a Gram join may cost, for the memory it saves. Where
#: the model expected +4% on a CPU with AVX-512 (ResNet-50's layer3.1), the whole block took 7 to 8% longer than with a
#: plain join: benchmarks/results/epyc-avx512-2core/runs.jsonl:5.
TOLERATED = 0.0
#: The same for a lazy chain, on a GPU, whose times are a roofline's with assumed shares: within this much, the variants
#: count as equally fast, and bytes decide. For ResNet-50 in bfloat16 at batch 256 it decides layer4's joins on A100,
#: H200 and B200 (+26%, +8% and +31%): 3.1 MB less moved and 0.6 MB less saved per image, for which `explain` predicts
#: 3 to 6% more for the block and up to 0.9% for the step; and layer4's projection on an RTX 4090 (+18%): 0.8 and 0.2 MB
#: less, 8% more for the block and 0.5% for the step. Nothing of this is measured; `tune` does that.
TOLERATED_LAZY = 1 / 3
#: Share of what a program on values saves anyway that kept activations may add: each saves a read and a write backward.
KEPT_SHARE = 0.20


class Variant(NamedTuple):
    """What the plan chooses of a program."""

    values: bool = False  # 1x1 convolutions are on values
    gram: bool = False  # branches are Gram joins, where they can be
    gram_shortcut: bool = False  # projections are
    keep: bool = False  # activations that are written for convolutions are kept for backward
    one_pass: bool = False  # both gradients of narrow convolutions on values come from one read of theirs
    taps: bool = False  # all other convolutions that can normalise on load and emit statistics, see `gpu_values`
    frozen: bool = False  # frozen norms are part of their convolution's launch, see `gpu_values`
    stock: bool = False


def serves(conv: Conv, own: StepTensors) -> bool:
    """Whether the 1x1 ops take a convolution that a norm reads."""
    return conv.is_pointwise(own.weight) and own.bias is None


def joins(program: Program) -> list[tuple[int, Terms]]:
    """The joins of `program`, by value: sums with a norm, and the norm that it ends in."""
    found = [(value, program.terms(value)) for value, node in program.numbered if isinstance(node, Addition)]
    if isinstance(program.nodes[-1], Normalisation):
        found.append((program.output, program.terms(program.output)))
    return [(value, terms) for value, terms in found if terms is not None]


def branch_of(call: Call, norm: int) -> tuple[Convolution, StepTensors] | None:
    """The convolution before the batch norm that makes value `norm`, if that alone reads it."""
    source = call.program.maker(norm).source
    conv = call.program.maker(source)
    if not isinstance(conv, Convolution) or len(call.program.readers(source)) > 1:
        return None
    return conv, call.tensors[source - call.program.inputs]


def gram_obstacle(call: Call, norm: int) -> str:
    """Why the branch that ends in this norm cannot be a Gram join; empty if it can."""
    found = branch_of(call, norm)
    if found is None:
        return "no convolution of its own"
    if not call.program.maker(norm).norm.batch_stats:
        return ""  # folding running statistics needs no Gram matrix: any convolution will do
    if not found[0].conv.is_pointwise(found[1].weight):
        return "not a 1x1 convolution"
    return "" if found[1].bias is None else "the convolution has a bias"


def values_obstacle(call: Call) -> str:
    """Why `call` cannot run on values; empty if it can."""
    if isinstance(call.program.nodes[-1], Pooling):
        return "a stem"
    for _, terms in joins(call.program):
        for norm in terms.norms:
            found = branch_of(call, norm)
            if found is None or not serves(found[0].conv, found[1]):
                return "the last convolution, or the projection, is not 1x1, or has a bias"
    return ""


class Options(NamedTuple):
    """What a program can be run as."""

    device: Device
    values: bool
    main: frozenset[int]  # see :func:`gram_branches`
    projections: frozenset[int]


def options(call: Call, on_tensors: bool = False) -> Options | None:
    """None: as one thing only, on tensors with written joins. `on_tensors`: what a CPU runs without values."""
    if choose.compiled_alone(call.program.backend, call.x) and not gpu_values.ones_fit(call):
        return None
    device = choose.value_device(call.program.backend, call.x)
    values = device is not None or (not on_tensors and bool(joins(call.program)) and cpu_values.serve(call))
    values = values and not values_obstacle(call)
    x, stem = call.x, isinstance(call.program.nodes[-1], Pooling)
    compiled = None if values or stem else choose.join_device(call.program.backend, x)
    if compiled is not None:
        return Options(compiled, False, *gram_branches(call, False))
    served = not stem and call.program.backend in ("auto", "cpu") and x.device.type == "cpu"
    served = served and x.dtype in onednn.SERVED
    if not values and (device is not None or not served):  # no join with an epilogue: the CPU's are oneDNN's
        return None
    return Options(device or CPU_CORE, values, *gram_branches(call, values))


def gram_branches(call: Call, values: bool) -> tuple[frozenset[int], frozenset[int]]:
    """The norms of branches that can be Gram joins, and of projections that can; `values`: on values.

    There a projection can only beside a branch that is one: no pass would add a product to a normalised tensor.
    """
    if values and not choose.forced_has("gram", call):
        return frozenset(), frozenset()
    main, projections = set(), set()
    for _, terms in joins(call.program):
        branch, *projection = terms.norms
        sampled = terms.sampled and call.sample_factor is not None  # which convolutions on tensors do not apply
        if (values or not sampled) and _can_be_main(call, branch, values):
            main.add(branch)
        if branch in main or not values:
            projections.update(norm for norm in projection if not gram_obstacle(call, norm))
    return frozenset(main), frozenset(projections)


def _can_be_main(call: Call, norm: int, values: bool) -> bool:
    if gram_obstacle(call, norm):
        return False
    # its input would have to be strided first; only projections are such, and have their own flag
    strided = branch_of(call, norm)[0].conv.stride != (1, 1)
    return not strided or not (values or call.program.maker(norm).norm.batch_stats)


def gram_share(call: Call, norm: int, shapes: list[torch.Size], chosen: Options) -> float:
    """Time that the Gram join of a branch with batch statistics is expected to add, forward and backward.

    As a share of its convolution's own; negative: it is faster.
    """
    (outputs, inputs), pixels = branch_of(call, norm)[1].weight.shape[:2], too_small.pixels(shapes[norm])
    dtype, lazy, device = call.x.dtype, chosen.values, chosen.device
    moved, multiplied = device.bandwidth_share * device.bandwidth, device.compute_share * device.peak(dtype)
    plain = (6 if lazy else 7) * pixels * outputs * dtype.itemsize / moved
    gram = (1 if lazy else 4) * pixels * inputs * dtype.itemsize / moved
    gram += (pixels * inputs * (inputs + 1) + 2 * pixels * inputs * inputs) / multiplied
    gram += (5 if lazy else 8) * outputs * inputs * inputs / (device.compute_share * device.single)  # in float32
    conv = max(3 * pixels * (inputs + outputs) * dtype.itemsize / moved, 6 * pixels * inputs * outputs / multiplied)
    return (gram - plain) / conv


def _saves(call: Call, norm: int, shapes: list[torch.Size]) -> bool:
    """Whether the Gram matrix, which is kept, takes less memory than what is not written."""
    inputs, dtype = branch_of(call, norm)[1].weight.shape[1], call.x.dtype
    return inputs**2 * stat_dtype(dtype).itemsize < shapes[norm].numel() * dtype.itemsize


def _pay(call: Call, norms: frozenset[int], shapes: list[torch.Size], chosen: Options) -> bool:
    """Whether there are such branches, and Gram joins of all are worth it."""
    tolerated = TOLERATED_LAZY if chosen.values and chosen.device is not CPU_CORE else TOLERATED
    measured = [norm for norm in norms if call.program.maker(norm).norm.batch_stats]
    if call.program.prefer == "memory":
        return bool(norms) and all(_saves(call, norm, shapes) for norm in measured)
    return bool(norms) and all(gram_share(call, norm, shapes, chosen) <= tolerated for norm in measured)


def written(call: Call, on_load: frozenset[int]) -> list[int]:
    """Values that are written for ATen's convolutions where the others, and those `on_load`, are on values."""
    reads = {node.source for v, node, own in call.convolutions if v not in on_load and not serves(node.conv, own)}
    return [value for value in reads if call.program.is_lazy(value)]


def _keeps(call: Call, shapes: list[torch.Size], on_load: frozenset[int]) -> bool:
    """Whether to keep the activations that ATen's convolutions read: a small share of what is saved anyway.

    Not in pre-activation blocks: a network of them would save more than 0.60 of stock's for 1.6% fewer bytes moved.
    """
    program = call.program
    if on_load and not written(call, on_load):
        return True  # there are none
    if not joins(program) or program.prefer == "memory":
        return False
    inner = [n for v, n in program.numbered if isinstance(n, Normalisation) and n.relu and v != program.output]
    saved = sum(shapes[value].numel() for value in {0, *(node.source for node in inner)})
    return sum(shapes[value].numel() for value in written(call, on_load)) <= KEPT_SHARE * saved


def _has_narrow(call: Call) -> bool:
    """Whether on values there is a convolution whose gradients one pass can make, in a dtype for which there is one."""
    ours = [(node, own) for _, node, own in call.convolutions if serves(node.conv, own)]
    if not any(pointwise.narrow(node.conv, own.weight) for node, own in ours):
        return False
    return choose.forced_has("conv1x1_backward", call) and not choose.lacking(("conv1x1_backward",), call.x)


def every(call: Call) -> list[Variant]:
    """Everything that `call` could be run as, were all kernels sound; first what is simplest."""
    found, on_load = options(call), gpu_values.taps(call)
    every = _every(call, found, frozenset())
    every += [variant._replace(taps=True) for variant in _every(call, found, on_load)] if on_load else []
    frozen = {values: gpu_values.frozen(call, values) for values in {variant.values for variant in every}}
    return every + [variant._replace(frozen=True) for variant in every if frozen[variant.values]]


def _every(call: Call, found: Options | None, on_load: frozenset[int]) -> list[Variant]:
    """Those where the convolutions `on_load` are on values beside the 1x1 ones."""
    if found is None:
        return [Variant()]
    on_cpu = found.device is CPU_CORE
    kept = (False, True) if found.values and not on_cpu and written(call, on_load) else (found.values and not on_cpu,)
    passes = (False, True) if found.values and not on_cpu and _has_narrow(call) else (False,)
    every = _joined(Options(CPU_CORE, False, *gram_branches(call, False))) if found.values and on_cpu else []
    every += [Variant()] if found.values and not on_cpu else []
    for variant in _joined(found):
        every += [variant._replace(keep=keep, one_pass=one_pass) for keep, one_pass in itertools.product(kept, passes)]
    return every


def _joined(found: Options) -> list[Variant]:
    """The variants that differ in their joins."""
    variants = []
    for main in (False, True) if found.main else (False,):
        for projection in (False, True) if found.projections and (main or not found.values) else (False,):
            variants.append(Variant(found.values, main, projection))
    return variants


def is_small(call: Call, shapes: list[torch.Size]) -> bool:
    """In a compiled graph nothing is: what small programs lose is the time of Python. Of stems only the smallest."""
    if choose.fuses_all() or choose.target() is not None:
        return False
    if isinstance(call.program.nodes[-1], Pooling) and shapes[-2].numel() > too_small.FEW_POOLED:
        return False
    return too_small.is_small(call, shapes)


def modelled(call: Call, shapes: list[torch.Size]) -> Variant:
    """The variant that the cost model chooses. `shapes`: of the values."""
    chosen = _modelled(call, shapes)
    return chosen._replace(frozen=not chosen.stock and bool(gpu_values.frozen(call, chosen.values)))


def _modelled(call: Call, shapes: list[torch.Size]) -> Variant:
    """But for frozen norms, which move less within their convolution's launch wherever that can be."""
    if is_small(call, shapes):
        return Variant(stock=True)
    found = options(call)
    if found is not None and found.values and found.device is CPU_CORE and not cpu_values.pay(call, shapes):
        found = options(call, on_tensors=True)
    on_load = gpu_values.taps(call)
    if found is None:
        return Variant(taps=bool(on_load))
    main, projection = (_pay(call, norms, shapes, found) for norms in (found.main, found.projections))
    if not found.values:  # a projection's Gram join alone spares less than what all norms' passes move
        return Variant(taps=True) if on_load and not main else Variant(False, main, projection)
    # on a CPU keeping what a 3x3 reads would add to what is saved, and one op makes two gradients
    on_gpu = found.device is not CPU_CORE
    keep, one_pass = on_gpu and _keeps(call, shapes, on_load), on_gpu and _has_narrow(call)
    return Variant(True, main, projection and main, keep, one_pass, bool(on_load))
