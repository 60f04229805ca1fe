"""From modules to a program, at call time: what :mod:`.site` has found no obstacle for is run fused.

A residual that stock would broadcast, or whose sum has another dtype, and a pool that no kernel takes, stand apart: the
program ends before them, and stock's operation follows. Everything else that does not fit is stock's from the start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import bounds, current, precision
from ..plan import choose, lower_evaluation
from ..plan.lower import decided_by, fits, lower, pools
from ..steps import Pool, StepTensors, stock
from ..steps.directions import Lowered
from ..steps.flow import Handed
from ..steps.layout import Placed, arrived, behind, left
from ..steps.program import Addition, Averaging, Call, Convolution, Normalisation, Pooling, Program, reading
from ..steps.program_node import RepeatedProgram, run_program
from ..steps.saved import refuses_inference_tensors
from . import drop_paths, ready, survivors
from .by_modules import called, draw
from .kept_evaluation import evaluate, takes
from .norms import is_frozen_class
from .site import Site
from .unchanged import Forms


class _Ran(threading.local):
    fused = hindered = 0


_ran = _Ran()


def fused_programs() -> int:
    """How many programs this thread has run as anything but stock operations by the plan's choice."""
    return _ran.fused


def hindered_programs() -> int:
    """How many this thread has run in stock's operations for another reason than the plan's choice."""
    return _ran.hindered


def count_fused() -> None:
    if not torch.compiler.is_compiling():
        _ran.fused += 1


def count_hindered() -> None:
    if not torch.compiler.is_compiling():
        _ran.hindered += 1


def read(site: Site) -> tuple[Program, list[StepTensors]]:
    """The program and the tensors of `site` as its modules are now; the same program as long as their settings are."""
    backend, tensors = site.backend if current() == "auto" else current(), site.tensors()
    who = backend, precision.of(site.precision)
    if site.kept is None or torch.compiler.is_compiling():
        return _with(site.shape.program, site.settings(), *who), tensors
    known = site.kept.unchanged or None
    if known is not None and not known.settings_hold():
        known = None
    if known is not None and known.read is not None and (known.read.backend, known.read.precision) == who:
        return known.read, tensors
    settings, found = site.settings(), site.kept.by_settings
    if (who, settings) not in found:
        if len(found) >= Forms.LIMIT:
            found.clear(), site.kept.lowered.clear()
        found[who, settings] = _with(site.shape.program, settings, *who)
    if known is not None:
        known.read = found[who, settings]
    return found[who, settings], tensors


_FIELDS = {Convolution: "conv", Normalisation: "norm", Pooling: "pool", Averaging: "average"}


def _with(program: Program, settings: tuple, *who: str) -> Program:
    nodes = []
    for node, own in zip(program.nodes, settings, strict=True):
        field = None if isinstance(node, Averaging) and own is None else _FIELDS.get(type(node))
        nodes.append(node if field is None else dataclasses.replace(node, **{field: own}))
    backend, precision = who
    return dataclasses.replace(program, nodes=tuple(nodes), backend=backend, precision=precision)


def run_site(
    site: Site, x: Placed, residual: Tensor | None = None, just_asked: bool = False, factor: Tensor | None = None
) -> Placed | None:
    """The program of `site` on `x`, in whatever layout it gives; nothing was found against it.

    `just_asked`: for obstacles, and no module has run since. `factor`: what a drop path drew. None: stock's operations
    are to run; nothing was moved or drawn.
    """
    if site.survivors and factor is None and (out := _on_survivors(site, x, residual)) is not None:
        return out
    form = None if factor is not None else ready.form_of(site, x, residual, just_asked)
    way = None if form is None else site.kept.unchanged.ready.get(form)
    if way is not None and (out := way(x, residual, draw(site, x.value))) is not None:
        count_fused()
        return out
    program, tensors = read(site)
    given, dtype, scope = x.value, None, contextlib.nullcontext()
    if torch.is_autocast_enabled(given.device.type) and given.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(given.device.type)
        scope = torch.autocast(given.device.type, enabled=False)
        inner = program.nodes[:-1] if _may_stand_apart(program) else program.nodes
        if given.dtype != dtype and not all(isinstance(node, Convolution) for node in inner if 0 in node.reads):
            choose.tell("stock (an input that autocast casts for convolutions alone)")
            return None
        if any(is_frozen_class(norm) and norm.weight.dtype != dtype for norm in site.norms):
            count_hindered()
            choose.tell("stock (a frozen norm's buffers, which autocast leaves as they are)")
            return None  # their product with them is float32
    if refuses_inference_tensors(tensors):
        count_hindered()
        return None
    given_factor, factor = factor, draw(site, given) if factor is None else factor
    with scope:
        call = Call(program, given if dtype is None else given.to(dtype), tensors, residual, factor)
        known = call.x is x.value and program.inputs == 1
        handed = Handed(x.moments, x.owned, x.into) if known else Handed()
        handed = None if torch.compiler.is_compiling() else handed
        out = _output(site, call, given, dtype, handed, form)
    if out is None:
        return None if factor is given_factor else arrived(called(site, left(x), residual, factor))
    weights = [site.modules[node].weight for node in program.main_convolutions]
    made = behind(out, x, weights, program)
    if handed is None:
        return made
    made = made._replace(source=handed.source)
    return made._replace(moments=handed.leaving, owned=not out.requires_grad) if known else made


def run_as_stock(site: Site, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The output of `site` where it leaves fused modules: in stock's layout; by stock's operations where it must."""
    out = run_site(site, arrived(x), residual)
    return called(site, x, residual) if out is None else left(out)


def _on_survivors(site: Site, x: Placed, residual: Tensor | None) -> Placed | None:
    """The output of `site` with its branch run on surviving samples; None where it runs on all, and nothing is drawn.

    Where all survive, there is nothing to gather.
    """
    parts, given = survivors.parts_of(site), x.value
    every = residual is None or (residual.dim() == 4 and residual.shape[0] == given.shape[0])
    if parts is None or not every or isinstance(given, FakeTensor) or not drop_paths.draws(site.drop_path):
        return None
    factor = draw(site, given)
    count_fused()
    if factor.count_nonzero() < factor.numel():
        return survivors.output(site, parts, x, residual, factor, run_site)
    out = run_site(site, x, residual, factor=factor)
    return arrived(called(site, left(x), residual, factor)) if out is None else out


def _output(
    site: Site,
    call: Call,
    given: Tensor,
    dtype: torch.dtype | None,
    handed: Handed | None = None,
    form: tuple | None = None,
) -> Tensor | None:
    """What a call of `site` gives, folded or by an autograd node; None: stock does it.

    `given`: the input before autocast. `dtype`: to which the convolutions' parameters are cast, as autocast would;
    None: they stay. `handed`: what is known of the input, and will be of the output. `form`: of the call, by which is
    kept how it ran.
    """
    last = call.program.nodes[-1]
    apart = isinstance(last, Pooling) and not (last.pool and _pools(call, last.pool))
    shapes = None if apart else call.shapes()
    outside = call.program.inputs > 1 and isinstance(last, Addition)
    to_conv = outside and isinstance(call.program.maker(last.branch), Convolution)  # which is no program by itself
    if to_conv and not _joins(call, given, shapes):
        count_hindered()
        return None
    if apart or (_may_stand_apart(call.program) and not _joins(call, given, shapes)):
        out = _output(site, _before_last(call), given, dtype)
        return None if out is None else _last(site, call, given, out)
    if not fits(call.program, shapes):
        return None
    repeated = None
    if takes(call) and not needs_grad(call) and not call.program.dense:
        out = evaluate(call, site.modules, dtype, handed)
        if out is not None and form is not None:
            ready.keep_evaluation(site, form, call, dtype)
    else:
        cast = call._replace(tensors=[own.cast(dtype) for own in call.tensors])
        lowered = _lowered(cast, None if site.kept is None else site.kept.lowered)
        if lowered.steps is None:
            if call.program.dense:
                return None
            return stock.program_output(cast, moves=True)  # the same to the bit; gradients have their weights' strides
        if form is not None:
            repeated = ready.keep_training(site, form, call, lowered, dtype)
        out = train(lowered, cast, handed, repeated)
    if out is not None:
        count_fused()
    return out


def _may_stand_apart(program: Program) -> bool:
    """Whether the last node adds an input to a batch norm right before it: what stock may broadcast or promote."""
    last = program.nodes[-1]
    adds_input = isinstance(last, Addition) and last.other < program.inputs
    return adds_input and last.branch == program.output - 1 and program.is_affine(last.branch)


def _joins(call: Call, given: Tensor, shapes: list[torch.Size]) -> bool:
    """Whether the input that the last node adds has its branch's shape and dtype."""
    last = call.program.nodes[-1]
    other = call.residual if last.other else given
    same = isinstance(other, Tensor) and (other.dtype, other.device) == (call.x.dtype, call.x.device)
    return same and other.shape == shapes[last.branch]


def _before_last(call: Call) -> Call:
    """A call of a program without its last node, which alone may read a residual from outside."""
    program, nodes = call.program, call.program.nodes[:-1]
    if isinstance(program.nodes[-1], Addition):
        nodes = (*nodes[:-1], dataclasses.replace(nodes[-1], sampled=program.nodes[-1].sampled))
        if program.inputs > 1:
            nodes = tuple(reading(node, [max(0, read - 1) for read in node.reads]) for node in nodes)
    program = dataclasses.replace(program, nodes=nodes, inputs=1)
    return call._replace(program=program, tensors=call.tensors[:-1], residual=None)


def _last(site: Site, call: Call, given: Tensor, y: Tensor) -> Tensor:
    """What the last node makes of what comes before it, by stock's operation."""
    last = call.program.nodes[-1]
    if isinstance(last, Pooling):
        return site.modules[-1](y)
    y = stock.add(last, y, call.residual if last.other else given, None, site.shape.inplace_add)
    return torch.relu(y) if last.relu else y


def _pools(call: Call, pool: Pool) -> bool:
    """Whether a pool is better done in the program, and does not raise stock's error for this size."""
    shape, on_gpu = call.shapes()[-2], choose.on_gpu(call.x)
    if not (on_gpu or needs_grad(call)):
        found = takes(call) and lower_evaluation.pools(call)
    else:  # folded on a CPU, as without a pool: somebody may compare what both give
        found = pools(call) and (on_gpu or call.program.batch_stats)
    return found and all(n + 2 * p >= k for n, p, k in zip(shape[2:], pool.padding, pool.kernel, strict=True))


def needs_grad(call: Call) -> bool:
    """Whether autograd wants anything from this call."""
    if not torch.is_grad_enabled():
        return False
    candidates = [*call.inputs, *(t for own in call.tensors for t in own[:4])]
    return any(t is not None and t.requires_grad for t in candidates)


def train(
    lowered: Lowered, call: Call, handed: Handed | None = None, repeated: RepeatedProgram | None = None
) -> Tensor:
    """The output of a call as an autograd node."""
    with contextlib.nullcontext() if torch.compiler.is_compiling() else bounds.private():
        return run_program(lowered, call, handed, repeated)


def _lowered(call: Call, kept: dict | None) -> Lowered:
    """How a call runs, decided once for all that it depends on."""
    decided = None if kept is None else decided_by(call)
    if decided is None:
        return lower(call)
    key = id(call.program), *decided  # which its settings keep
    found = kept.get(key, key)  # a key is no answer
    if found is key:
        kept[key] = found = lower(call)
    return found
