"""`fuse`, `unfuse` and `report`: other people's models, in place."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

from torch import nn

from ..backends import check_name
from ..backends.precision import check_word
from ..blocks import dense, norms, survivors
from ..steps.dense import KEPT, RECOMPUTED
from . import swap
from .fused_module import FusedState, fused_class
from .instructions import Form, Ref, ShapeCall
from .outside import read_by
from .regions import build
from .report import BUILT_FUSED, Report, complaint, is_fused_here, outermost, survey
from .stage import fuse_stage
from .stem import fuse_stem
from .trace import Untraceable, fingerprint, names_read, opens, state_of, trace

#: What a dense block saves by the preference.
PREFERENCES = {"speed": KEPT, "memory": RECOMPUTED}
FilterFn = Callable[[str, nn.Module], bool]


def _is_dense(module: nn.Module) -> bool:
    """Whether `module`, fused or not, is of a class that is known as a dense block."""
    return dense.kind_of(swap.stock_class(module)) is not None


def _is_candidate(module: nn.Module) -> bool:
    """Whether `fuse` looks at a module, again if it is fused."""
    if is_fused_here(module):
        return not isinstance(module, BUILT_FUSED)
    return _is_dense(module) or any(
        isinstance(child, nn.Conv2d) or not norms.why_not(child) or _is_chain(child) for child in module.children()
    )


def _is_chain(module: nn.Module) -> bool:
    """Whether a block's graph has what `module`, of somebody's class, calls in its place."""
    return not isinstance(module, nn.Sequential) and opens(module)


def fuse(
    model: nn.Module,
    *,
    filter_fn: FilterFn | None = None,
    backend: str = "auto",
    precision: str | None = None,
    drop_path: str | None = None,
    prefer: str | None = None,
    strict: bool = False,
) -> nn.Module:
    """Fuse the residual blocks (and conv-BN-ReLU chains) of `model`, in place.

    Parameters, their names and the ``state_dict`` stay as they are, and so do hooks, ``isinstance`` and everything
    else; only the class of each fused module becomes a subclass that runs the same mathematics with fewer passes over
    memory. Blocks are recognised by their structure, not by their class: torchvision's, timm's and your own. What
    cannot be fused stays stock, see :func:`report`; one warning says so where that is more than half of the model's
    convolutions. Calling it again fuses what is new and changes nothing else.

    Args:
        model: any module; also a single block.
        filter_fn: ``filter_fn(name, module) -> bool``; modules for which it is false are left alone.
        backend: who runs the ops, "auto" or a name of :func:`resnet_fused.use`.
        precision: how exact float32 convolutions on CPUs are, "default" or "fast", see :func:`resnet_fused.precision`;
            None: as fused before, else "default".
        drop_path: which samples a block's branch runs on in training where stochastic depth drops some (timm's
            DropPath, torchvision's StochasticDepth and ours): "all", as stock, or "survivors". **The latter changes
            batch statistics**: norms within the branch see and follow the surviving samples only, and where none
            survives its parameters' gradients are zeros and nothing in it runs. It makes stock's random draws, gains
            where convolutions outweigh the gathering (not in thin nets with a draw for each sample), waits for the GPU
            once a block to learn how many survive, breaks graphs of ``torch.compile`` there, and raises stock's error
            where a norm is left with one value a channel. A block that runs its stock forward (hooks, ...), or
            whose row in :func:`report` says so, runs on all. None: as fused before, else "all".
        prefer: "speed", or "memory" where less is to be saved for backward though a step takes longer: blocks end in
            Gram joins wherever these save any, whatever the plan expects of them or `tune` has measured, dense blocks
            compute in backward again what lies between the two convolutions of a layer, and squeeze-excite and its
            kin what they read. None: as fused before, else "speed".
        strict: raise instead of warn when there is nothing to fuse.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: unknown `backend`, `precision`, `drop_path` or `prefer`; or nothing to fuse, with `strict`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model is {type(model).__name__}; pass a torch.nn.Module")
    check_name(backend)
    check_word("default" if precision is None else precision)
    check_word("all" if drop_path is None else drop_path, survivors.WORDS, "drop_path")
    check_word("speed" if prefer is None else prefer, PREFERENCES, "preference")
    left: dict[int, str] = {}  # module -> why nothing of it was fused
    left_out: set[str] = set()
    for name, module in outermost(model):
        if filter_fn is not None and not filter_fn(name, module):
            left_out.add(name)
        elif _is_candidate(module):
            reason = _fuse_one(module, backend, precision, drop_path, prefer)
            if reason and fuse_stem(module, backend, precision):
                left[id(module)] = reason
    for module in list(model.modules()):
        fuse_stage(module)
    nothing = not any(map(is_fused_here, model.modules()))
    text = complaint(model, survey(model, lambda module: left.get(id(module)), left_out), nothing)
    if text and nothing and strict:
        raise ValueError(text)
    if text:
        warnings.warn(text, stacklevel=2)
    return model


def _forms(module: nn.Module, prefer: str = "speed") -> tuple[tuple[Form, ...], list[str]]:
    """What the stock forward of `module`, fused or not, can run as, and why parts of it stay stock.

    The first of several that may run is to; with dropout that is another one while it does nothing.

    Raises:
        Untraceable: as nothing of ours, or nobody can tell.
    """
    if _is_dense(module):
        return (_dense_form(module, prefer),), []
    graph = trace(module, swap.stock_class(module))
    form, reasons = build(module, graph)
    quiet, _ = build(module, graph, quiet=True)
    forms = (quiet if quiet and quiet.quiet else None, form)
    forms = tuple(one if prefer == "speed" else _preferring(one, prefer) for one in forms if one is not None)
    reasons = list(dict.fromkeys(reasons))
    if not forms:
        raise Untraceable("; ".join(reasons))
    return forms, reasons


def _preferring(form: Form, prefer: str) -> Form:
    """`form` with programs that prefer something."""
    calls = []
    for call in form.calls:
        if isinstance(call, ShapeCall):
            program = dataclasses.replace(call.shape.program, prefer=prefer)
            call = dataclasses.replace(call, shape=dataclasses.replace(call.shape, program=program))
        calls.append(call)
    return dataclasses.replace(form, calls=tuple(calls))


def _dense_form(module: nn.Module, prefer: str) -> Form:
    """The form of a dense block.

    Raises:
        Untraceable: it is not what others of its class are.
    """
    cls = swap.stock_class(module)
    if reason := dense.why_not(module, cls):
        raise Untraceable(reason)
    kind = dense.kind_of(cls)
    saves = dense.saves_of(module, kind, PREFERENCES[prefer])
    (shape,) = dense.shapes_of(tuple(module._modules), kind.layer[1], kind.relus, saves)
    return Form((ShapeCall(shape, ("x",), "out"),), "x", Ref("out"), (), (), tuple(shape.modules))


def _fuse_one(module: nn.Module, backend: str, precision: str | None, drop_path: str | None, prefer: str | None) -> str:
    """Make one module run its programs, also if it did already. Returns why it does not, or an empty text."""
    cls, before = swap.stock_class(module), module.__dict__.get(swap.STATE)
    prefer = prefer or getattr(before, "prefer", "speed")
    try:
        forms, reasons = _forms(module, prefer)
    except Untraceable as error:
        swap.remove(module)
        return str(error)
    state = FusedState(
        forms=forms,
        traced=() if forms[0].is_dense else state_of(module, names_read(module, cls)),
        code=fingerprint(cls.forward),
        backend=backend,
        precision=precision or getattr(before, "precision", "default"),
        drop_path=drop_path or getattr(before, "drop_path", "all"),
        prefer=prefer,
        outside=read_by(cls.forward),
        reasons=tuple(reasons),
    )
    return swap.put(module, fused_class, state)


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse` on `model` and everything in it, in place; returns `model`. A stock model is left as it is."""
    for module in model.modules():
        swap.remove(module)
    return model


def report(model: nn.Module) -> Report:
    """What is fused in `model` now and what is stock, with reasons; for both, as the next call would run it."""
    return survey(model, _why_left)


def _why_left(module: nn.Module) -> str | None:
    """Why a module is not fused; None if it is no block."""
    if not _is_candidate(module):
        return None
    try:
        _forms(module)
    except Untraceable as error:
        return str(error)
    return "fuse() was not called on it"
