"""Stages on a GPU in evaluation whose blocks all repeat tapes: what they were found to be is asked for at once.

A block proves at every call that its modules may be bypassed, and finds what it did by the form of the call. In a stage
whose blocks all repeat tapes (:mod:`..backends.tape`) that takes longer than the tapes. So after some calls of one form
a stage keeps the tapes in order, and everything that led to them, as one list: the modules object by object, their
classes' methods, hooks, tensors, what each forward reads outside, settings. Whatever differs, the blocks are asked
again, one by one, and nothing is kept until another such number of calls.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards

from ..backends import dispatch, met
from ..backends.tape import PLAIN, Tape
from ..blocks import drop_paths, proven, ready, runtime
from ..blocks.unchanged import Forms, Methods, Same, hooks_of, is_wrapper
from ..plan import choose, measured
from .fused_module import STATE, FusedState, Running, entry_obstacle, is_entered, placed
from .trace import value_of

_ITERATION = nn.Sequential.__iter__  # by which a stage that is not kept goes through its blocks
#: Calls of a form before a stage of it is kept: by then each block has a tape.
CALLS = PLAIN + 4


class Settled:
    """A stage for calls of one form."""

    def __init__(self, entries: list[Running], runs: list[tuple[Tape, list[tuple[dict, str]]]]) -> None:
        self.blocks, self._entry = [entry.block for entry in entries], entries[0]
        modules = [*dict.fromkeys(module for block in self.blocks for module in block.modules())]
        self._same = Same(modules, ("_parameters", "_buffers", "_modules"))
        self._hooks = hooks_of(self._same.owns)
        known = [entry.sites[0].kept.unchanged for entry in entries]
        self._methods = [*{methods.cls: methods for one in known for methods in one.classes}.values()]
        if any(entry.form.containers for entry in entries):
            self._methods.append(Methods(nn.Sequential))
        self._firsts = [*{(type(block), _code(block)): block for block in self.blocks}.values()]
        reads = {(type(b), *read): b for b in self.blocks for read in b.__dict__[STATE].traced}
        self._read = [(b, name, value) for (_, name, value), b in reads.items() if name not in b.__dict__]
        self._dicts = [own[name] for own in self._same.owns for name in ("_parameters", "_buffers")]
        tensors = self._tensors()
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self._memory = self._memory_of(tensors)
        at = {id(t): i for i, t in enumerate(tensors)}
        self._runs = [(t.repeat, operator.itemgetter(*(at[id(own[n])] for own, n in slots))) for t, slots in runs]
        self._tapes = [*{tape.runs_on: tape for tape, _ in runs}.values()]

    def _tensors(self) -> list[Tensor]:
        return [t for t in itertools.chain.from_iterable(map(dict.values, self._dicts)) if t is not None]

    @staticmethod
    def _memory_of(tensors: Sequence[Tensor]) -> list[int]:
        return [*map(Tensor.data_ptr, tensors)]

    def run(self, stage: nn.Sequential, x: Tensor) -> Tensor | None:
        """The output; None where something is not as it was."""
        if not self._holds(stage) or entry_obstacle(x, self._entry):
            return None
        tensors = self._tensors()
        if not self._guards.check(*tensors) or self._memory_of(tensors) != self._memory:
            return None
        for repeat, own in self._runs:
            (x,) = repeat(x, None, *own(tensors))
            runtime.count_fused()
        return x

    def _holds(self, stage: nn.Sequential) -> bool:
        now = stage._modules
        return (
            len(now) == len(self.blocks)
            and all(map(operator.is_, now.values(), self.blocks))
            and not any(self._hooks)
            and self._same.holds()
            and all(map(Methods.holds, self._methods))
            and not proven.functions_exchanged()
            and nn.Sequential.__iter__ is _ITERATION
            and all(map(_as_traced, self._firsts))
            and all(value_of(block, name) == value for block, name, value in self._read)
            and all(map(Tape.holds, self._tapes))
        )


def _code(block: nn.Module) -> tuple:
    state: FusedState = block.__dict__[STATE]
    return state.code, state.outside


def _as_traced(block: nn.Module) -> bool:
    """Whether the forward of a block's class is the one that was traced, and is what a call of the block runs."""
    code, outside = _code(block)
    if not is_entered(block) or code != block._resnet_fused_code or block._resnet_fused_replaced("forward"):
        return False
    return outside.is_kept(type(block)._resnet_fused_reader)


#: By the form of a call: how often it came, or the stage for it.
_kept: weakref.WeakKeyDictionary[nn.Sequential, Forms] = weakref.WeakKeyDictionary()


def _form(x: object) -> tuple | None:
    """All of a call but the modules; None where every block is to be asked."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch.is_grad_enabled() or not choose.on_gpu(x):
        return None
    if met.is_seen() or choose.observers or choose.tuner() is not None or is_wrapper(x):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None  # which casts weights
    settings = choose.target(), choose.fuses_all(), measured.changes(), torch.is_inference_mode_enabled()
    return *ready.facts(x), *settings, *dispatch.state()


def output(stage: nn.Sequential, x: object) -> Tensor | None:
    """The output of a stage that is kept for such a call, and is what it was; else None."""
    kept = None if torch.compiler.is_compiling() else _kept.get(stage)
    form = None if kept is None else _form(x)
    found = None if form is None else kept.get(form)
    if not isinstance(found, Settled):
        return None
    out = found.run(stage, x)
    if out is None:
        del kept[form]
    return out


def settle(stage: nn.Sequential, entries: list[Running], x: object) -> Tensor | None:
    """The output, by each block, and from then on by :func:`output`; None where that is not due or cannot be."""
    form = _form(x)
    if form is None or len(entries) != len(stage):
        return None
    kept = _kept.setdefault(stage, Forms())
    calls = kept.get(form, 0)
    if calls != CALLS:
        if isinstance(calls, int):
            kept[form] = calls + 1
        return None
    kept[form] = None  # unless it is found to be one
    value, runs = placed(x), []
    for entry in entries:
        way = _repeated(entry, value)
        if way is None or (value := way(value, None, None)) is None:
            return None
        runs.append((way.repeated.tape, way.slots))
    if not value.channels_last:
        return None  # it would be copied
    kept[form] = Settled(entries, runs)
    return value.value


def _repeated(entry: Running, value: object) -> ready.Ready | None:
    """What repeats a block; None where it is more than that."""
    form, site = entry.form, entry.sites[0]
    if not form.is_whole or form.opened or form.between or site.survivors or site.activated:
        return None
    if site.kept is None or not site.kept.unchanged or drop_paths.draws(site.drop_path):
        return None
    known = ready.form_of(site, value, None, True)
    way = None if known is None else site.kept.unchanged.ready.get(known)
    tape = None if way is None or way.repeated is None else way.repeated.tape
    return None if tape is None or not tape.runs_on or way.dtype is not None else way
