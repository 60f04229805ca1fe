"""Stages in evaluation whose blocks all do again what they did: what they were found to be is asked for at once.

A block proves at every call that its modules may be bypassed, and finds what it did by the form of the call. In a stage
whose blocks all repeat tapes (:mod:`..backends.tape`) that takes longer than the tapes, and on a CPU as long as small
convolutions. So after some calls of one form a stage keeps in order the tapes, or the steps and what they are made
from, and everything that led to them, as one list: the modules object by object, their classes' methods, hooks,
tensors, what each forward reads outside, settings; of tensors that are folded also versions and content. Whatever
differs, the blocks are asked again, one by one, and nothing is kept until another such number of calls.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards

from ..backends import bounds, dispatch, met
from ..backends.tape import PLAIN, Tape
from ..blocks import drop_paths, proven, ready, runtime
from ..blocks.kept_evaluation import Recent, is_dense
from ..blocks.unchanged import Forms, Methods, Same, hooks_of, is_wrapper
from ..plan import choose, measured
from ..steps.flow import Handed
from ..steps.folding import Folded
from ..steps.layout import Placed
from ..steps.program import Call
from ..steps.spec import regroup, spread
from .fused_module import STATE, FusedState, Running, entry_obstacle, is_entered, runnable
from .trace import value_of

_ITERATION = nn.Sequential.__iter__  # by which a stage that is not kept goes through its blocks
#: Calls of a form before a stage of it is kept: by then each block has a tape, or all of them keep folded weights.
CALLS, CALLS_FOLDED = PLAIN + 4, 3


class _Repeats:
    """A block by its tape."""

    def __init__(self, tape: Tape) -> None:
        self._repeat = tape.repeat

    def __call__(self, x: Tensor, own: tuple[Tensor, ...], _: bool) -> Tensor:
        return self._repeat(x, None, *own)[0]


class _Folds:
    """A block by steps that are made from its parameters."""

    def __init__(self, folding: ready.Folding, made: list[Folded | None]) -> None:
        self._folding, self._made = folding, made

    def __call__(self, x: Tensor, own: tuple[Tensor, ...], owned: bool) -> Tensor:
        way, program, places = self._folding
        return way.run(Call(program, x, regroup(spread(own, places)), None), self._made, Handed(owned=owned))


class _Contents:
    """Tensors from which something was made: a write moves a version, or, where it bypasses that, changes content."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._versioned = [i for i, t in enumerate(tensors) if not t.is_inference()]
        self.sums, self._versions = self._sums_of(tensors), self._versions_of(tensors)

    @staticmethod
    def _sums_of(tensors: Sequence[Tensor]) -> list[int]:
        return torch.ops.resnet_fused.checksum(tensors) if tensors else []

    def _versions_of(self, tensors: Sequence[Tensor]) -> list[int]:
        return [tensors[i]._version for i in self._versioned]

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        return self._versions_of(tensors) == self._versions and self._sums_of(tensors) == self.sums


class Settled:
    """A stage for calls of one form, from how its blocks run and what those that fold are made from."""

    def __init__(
        self, entries: list[Running], ways: list[ready.Ready], made: list[list[Folded | None] | None], first: int
    ) -> None:
        self.blocks, self._entry, self._first = [entry.block for entry in entries], entries[0], first
        modules = [*dict.fromkeys(module for block in self.blocks for module in block.modules())]
        self._same = Same(modules, ("_parameters", "_buffers", "_modules"))
        self._hooks = hooks_of(self._same.owns)
        known = [entry.sites[0].kept.unchanged for entry in entries]
        self._methods = [*{methods.cls: methods for one in known for methods in one.classes}.values()]
        if any(entry.form.containers for entry in entries):
            self._methods.append(Methods(nn.Sequential))
        self._firsts = [*{(type(block), _code(block)): block for block in self.blocks}.values()]
        reads = [(b, *read) for b in self.blocks for read in b.__dict__[STATE].traced]
        self._read = [*{(type(b), *read): (b, *read) for b, *read in reads if read[0] not in b.__dict__}.values()]
        self._dicts = [own[name] for own in self._same.owns for name in ("_parameters", "_buffers")]
        tensors = self._tensors()
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self._memory = self._memory_of(tensors)
        at = {id(t): i for i, t in enumerate(tensors)}
        owns = [_picker([at[id(own[name])] for own, name in way.slots]) for way in ways]
        runs = [
            _Repeats(w.repeated.tape) if m is None else _Folds(w.folding, m) for w, m in zip(ways, made, strict=True)
        ]
        self._runs = [*zip(runs, owns, strict=True)]
        self._folded = [at[id(t)] for way, own in zip(ways, owns, strict=True) for t in _sources(way, own(tensors))]
        self.contents = _Contents([tensors[i] for i in self._folded])
        tapes = [way.repeated.tape for way in ways if way.folding is None]
        self._tapes = [*{tape.runs_on: tape for tape in tapes}.values()]

    def _tensors(self) -> list[Tensor]:
        return [t for t in itertools.chain.from_iterable(map(dict.values, self._dicts)) if t is not None]

    @staticmethod
    def _memory_of(tensors: Sequence[Tensor]) -> list[int]:
        return [*map(Tensor.data_ptr, tensors)]

    def run(self, stage: nn.Sequential, x: Tensor, owned: bool) -> Tensor | None:
        """The output; None where something is not as it was. `owned`: nobody else has `x`."""
        if not self._holds(stage) or entry_obstacle(x, self._entry):
            return None
        tensors = self._tensors()
        if not self._guards.check(*tensors) or self._memory_of(tensors) != self._memory:
            return None
        if not self.contents.hold([tensors[i] for i in self._folded]):
            return None
        with bounds.private():
            for run, own in self._runs:
                x, owned = run(x, own(tensors), owned), True
                runtime.count_fused()
        return x

    def _holds(self, stage: nn.Sequential) -> bool:
        now = [*stage._modules.values()][self._first :]
        return (
            len(now) == len(self.blocks)
            and all(map(operator.is_, now, self.blocks))
            and not any(self._hooks)
            and self._same.holds()
            and all(map(Methods.holds, self._methods))
            and not proven.functions_exchanged()
            and nn.Sequential.__iter__ is _ITERATION
            and all(map(_as_traced, self._firsts))
            and all(value_of(block, name) == value for block, name, value in self._read)
            and all(map(Tape.holds, self._tapes))
        )


def _picker(places: list[int]) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
    """A function that returns the tensors at these places: a block may have a single one."""
    found = operator.itemgetter(*places)
    return found if len(places) > 1 else lambda tensors: (found(tensors),)


def _sources(way: ready.Ready, own: tuple[Tensor, ...]) -> list[Tensor]:
    """What is folded of a block's tensors."""
    if way.folding is None:
        return []
    return way.folding.way.sources(regroup(spread(own, way.folding.places)))


def _code(block: nn.Module) -> tuple:
    state: FusedState = block.__dict__[STATE]
    return state.code, state.outside


def _as_traced(block: nn.Module) -> bool:
    """Whether the forward of a block's class is the one that was traced, and is what a call of the block runs."""
    code, outside = _code(block)
    if not is_entered(block) or code != block._resnet_fused_code or block._resnet_fused_replaced("forward"):
        return False
    return outside.is_kept(type(block)._resnet_fused_reader)


#: By the form of a call and the block that is the first: how often it came, or the stage for it.
_kept: weakref.WeakKeyDictionary[nn.Sequential, Forms] = weakref.WeakKeyDictionary()


def _form(x: object) -> tuple | None:
    """All of a call but the modules; None where every block is to be asked."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch.is_grad_enabled():
        return None
    if not (x.is_cpu or choose.on_gpu(x)):
        return None
    if met.is_seen() or choose.observers or choose.tuner() is not None or is_wrapper(x):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None  # which casts weights
    settings = choose.target(), choose.fuses_all(), measured.changes(), torch.is_inference_mode_enabled()
    return *ready.facts(x), *settings, *dispatch.state()


def output(stage: nn.Sequential, x: object, first: int = 0, owned: bool = False) -> Tensor | None:
    """The output of a stage that is kept for such a call, and is what it was; else None.

    `first`: the block that reads `x`, before which none is kept. `owned`: nobody else has `x`.
    """
    kept = None if torch.compiler.is_compiling() else _kept.get(stage)
    form = None if kept is None else _form(x)
    found = None if form is None else kept.get((first, form))
    if not isinstance(found, Settled):
        return None
    out = found.run(stage, x, owned)
    if out is None:
        kept.clear()  # what other forms were made from is gone too
    return out


def settle(stage: nn.Sequential, find: Callable[[], list[Running] | None], x: Placed, first: int = 0) -> Tensor | None:
    """The output, by each block, and from then on by :func:`output`; None where that is not due or cannot be.

    `find`: what each block from `first` on runs; it is asked once.
    """
    form = _form(x.value)
    if form is None or (first and not x.channels_last):
        return None
    kept, form = _kept.setdefault(stage, Forms()), (first, form)
    calls = kept.get(form, 0)
    if calls is None or isinstance(calls, Settled):
        return None
    kept[form] = None if calls == CALLS else calls + 1  # unless it is found to be one
    if calls not in (CALLS_FOLDED, CALLS):
        return None
    entries, value, ways = find(), x._replace(owned=False), []  # where values decide for stock's, `x` is needed again
    if entries is None or len(entries) != len(stage) - first:
        return None
    if entry_obstacle(x.value, entries[0]):
        kept[form] = calls  # a mode, which a later call may not have
        return None
    for entry in entries:
        way = _known(entry, value)
        if way is None or (value := way(value, None, None)) is None:
            return None
        runtime.count_fused()  # else the stage would be taken to run as stock
        ways.append(way)
    if not value.channels_last:
        return None  # it would be copied
    made = [None if way.folding is None else way.folding.way.settled() for way in ways]
    if any(way.folding is not None and of is None for way, of in zip(ways, made, strict=True)):
        kept[form] = calls  # as calls of another form came between; the next one may be
        return value.value
    tensors = [[inner[name] for inner, name in way.slots] for way in ways]
    if all(is_dense(t) for way, own in zip(ways, tensors, strict=True) for t in _sources(way, own)):
        settled = _made_now(entries, ways, made, first)
        if settled is None:
            return value.value
        kept[form] = settled
        for other in [f for f, one in [*kept.items()] if isinstance(one, Settled) and _differ(one, settled)]:
            kept.pop(other, None)  # which another thread may have done
    return value.value


def _made_now(entries: list[Running], ways: list[ready.Ready], made: list[Recent | None], first: int) -> Settled | None:
    """The stage; None where another thread has changed something since the blocks ran."""
    known = [entry.sites[0].kept.unchanged for entry in entries]
    try:
        settled = Settled(entries, ways, [None if of is None else of.made for of in made], first)
    except LookupError:  # of a tensor in another one's place
        return None
    if settled.contents.sums != [one for of in made if of is not None for one in of.sums]:
        return None
    now = [entry.sites[0].kept.unchanged for entry in entries if runnable(entry.block) == entry]
    return settled if len(now) == len(known) and all(map(operator.is_, now, known)) else None


def _differ(one: Settled, other: Settled) -> bool:
    """Whether they were made from other contents; then the older one will never run again."""
    return bool(one.contents.sums and other.contents.sums) and one.contents.sums != other.contents.sums


def _known(entry: Running, value: object) -> ready.Ready | None:
    """How a block runs that repeats a tape or folds; None where it is more than that."""
    form, site = entry.form, entry.sites[0]
    if not form.is_whole or form.opened or form.between or site.survivors or site.activated:
        return None
    if site.kept is None or not site.kept.unchanged or drop_paths.draws(site.drop_path):
        return None
    known = ready.form_of(site, value, None, True)
    way = None if known is None else site.kept.unchanged.ready.get(known)
    if way is None or way.dtype is not None:
        return None
    tape = None if way.repeated is None else way.repeated.tape
    return way if way.folding is not None or (tape is not None and tape.runs_on) else None
