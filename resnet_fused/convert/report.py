"""What is fused in a model and what is not, in rows, shares and reasons.

Everything here is read from modules and programs by name: no forward is called, and a child that was replaced or
removed since ``fuse`` is a reason, not an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn

from ..blocks import drop_paths
from ..blocks.dense import FusedDenseBlock
from ..blocks.inputs import as_gathered
from ..blocks.modules import FusedConvBNReLU, FusedResidualBlock
from ..blocks.site import CHANGED, module_obstacle
from ..blocks.survivors import parts_of
from . import gates
from .fused_module import FusedModule, Running, choose
from .instructions import GatedSum, StockCall
from .shares import Share, convolutions_in, counted, describe, join, of_form, passes_in
from .stem import FusedStem, stem_site
from .swap import STATE, is_fused, stock_class
from .trace import Untraceable, trace

BUILT_FUSED = (FusedConvBNReLU, FusedDenseBlock, FusedResidualBlock)  # fused without fuse()
#: How many names stand for a group of modules; how many reasons a warning gives, and the length of each.
NAMES, REASONS, LENGTH = 2, 3, 240


@dataclasses.dataclass(frozen=True)
class Row:
    """One module in a :class:`Report`; what has a row of its own counts there and not here."""

    name: str
    kind: str  # class of the module
    what: str  # what is fused in it; empty if nothing is
    reason: str  # why it, or the rest of it, is stock; empty if nothing is left
    convolutions: Share
    passes: Share  # norms, activations and, where the forward was read, additions

    def __str__(self) -> str:
        shares = self.convolutions, self.passes
        fused = "fused" if all(share.fused == share.total for share in shares) else "fused in part"
        text = f"{self.name or '(model)'} ({self.kind}): " + (f"{fused}: {self.what}" if self.what else "stock")
        return f"{text}; {self.convolutions} convolutions, {self.passes} passes"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was fused and what was left, with reasons; ``str()`` is a line a fused module and a line a reason."""

    fused: tuple[Row, ...]
    left: tuple[Row, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return (*self.fused, *self.left)

    @property
    def convolutions(self) -> Share:
        """Of the whole model."""
        return Share.sum(row.convolutions for row in self.rows)

    @property
    def passes(self) -> Share:
        """Of the whole model."""
        return Share.sum(row.passes for row in self.rows)

    def reasons(self) -> list[str]:
        """Every reason once, with the modules that it holds for; first what leaves most convolutions stock."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.reason:
                groups.setdefault(row.reason, []).append(row)

        def weight(rows: list[Row]) -> tuple[int, int]:
            convolutions, passes = Share.sum(r.convolutions for r in rows), Share.sum(r.passes for r in rows)
            return convolutions.total - convolutions.fused, passes.total - passes.fused

        ordered = sorted(groups.items(), key=lambda group: weight(group[1]), reverse=True)
        return [f"{_names(rows)}: {reason}" for reason, rows in ordered]

    def __str__(self) -> str:
        head = f"{len(self.fused)} modules fused, {len(self.left)} left stock"
        lines = [f"{head}; {self.convolutions} convolutions, {self.passes} passes (norms, activations, additions)"]
        lines += [f"  {row}" for row in self.fused]
        reasons = self.reasons()
        return "\n".join(lines + (["Stock, and why:", *(f"  {reason}" for reason in reasons)] if reasons else []))


def _names(rows: list[Row]) -> str:
    """The first few names of many, and their class if they share one."""
    names = [row.name or "(model)" for row in rows]
    text = ", ".join(names[:NAMES]) + (f" and {len(names) - NAMES} more" if len(names) > NAMES else "")
    kinds = {row.kind for row in rows}
    return text + (f" ({kinds.pop()})" if len(kinds) == 1 else "")


def complaint(model: nn.Module, report: Report, nothing: bool) -> str:
    """What `fuse` warns of: that it fused `nothing`, or less than half of the convolutions; empty if it need not."""
    convolutions = report.convolutions
    kind = next((row.kind for row in report.rows if not row.name), type(model).__name__)
    if nothing:
        text = f"fuse: nothing to fuse in {kind}"
        if not report.left:
            return f"{text}: it has no convolution in a block"
    elif 2 * convolutions.fused >= convolutions.total:
        return ""
    else:
        text = f"fuse: only {convolutions} convolutions and {report.passes} passes of {kind} are fused"
    reasons = report.reasons()
    shown = [reason if len(reason) <= LENGTH else reason[:LENGTH] + " ..." for reason in reasons[:REASONS]]
    more = [f"and {len(reasons) - REASONS} more reasons"] if len(reasons) > REASONS else []
    lines = "\n  ".join([f"{text}. What stays stock:", *shown, *more])
    return f"{lines}\nprint(resnet_fused.report(model)) lists every module"


def survey(
    model: nn.Module,
    why_left: Callable[[nn.Module], str | None],
    left_out: Collection[str] = (),
) -> Report:
    """The rows of `model`.

    Args:
        model: fused or not.
        why_left: of a module that is not fused, why not; None if it is no block.
        left_out: names of modules that get no row, and count in nobody's.
    """
    found: dict[str, tuple[nn.Module, str]] = {}  # name -> module, why it was left
    for name, module in outermost(model):
        reason = "" if name in left_out or is_fused_here(module) else why_left(module)
        if reason is not None:
            found[name] = module, reason
    fused, left = [], []
    for name, (module, reason) in found.items():
        own = dict(counted(module, found, name))
        with as_gathered(model):
            row = Row(name, stock_class(module).__name__, *_read(module, reason, own))
        if name not in left_out:
            (fused if row.what else left).append(row)
    return Report(tuple(fused), tuple(left))


def is_fused_here(module: nn.Module) -> bool:
    """Whether it was built fused, or `fuse` made something of it; classes of ours without a state run as stock."""
    return isinstance(module, BUILT_FUSED) or is_fused(module, FusedModule | FusedStem)


def outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model` by name, but for those that one before them runs, which may be fused as it is met."""
    inside: set[str] = set()
    for name, module in list(model.named_modules()):
        if name not in inside:
            yield name, module
            inside |= {join(name, inner) for inner in _runs_itself(module)}


def _runs_itself(module: nn.Module) -> set[str]:
    """Names of what is in a module that is fused here and runs with it."""
    if not is_fused_here(module):
        return set()
    if isinstance(module, BUILT_FUSED):
        return {name for name, _ in module.named_modules() if name}
    state = module.__dict__[STATE]
    if isinstance(module, FusedStem):
        return {name for stem in state.stems for name in stem[:3]}
    return set().union(*(form.stood_in for form in state.forms))


_Read = tuple[str, str, Share, Share]  # what is fused, why something is not, convolutions, passes


def _read(module: nn.Module, reason: str, own: dict[str, nn.Module]) -> _Read:
    """A module as its next call would run it."""
    convolutions, passes = convolutions_in(own), passes_in(own)
    if not is_fused_here(module):
        return "", reason, Share(0, convolutions), Share(0, passes)
    if isinstance(module, FusedStem):
        return _read_stems(module, convolutions, passes)
    if isinstance(module, FusedModule):
        return _read_form(module, own)
    if isinstance(module, FusedResidualBlock):  # one ReLU is called behind every step, and there is an addition
        passes += len(module._steps)
    return "built fused", "", Share(convolutions, convolutions), Share(passes, passes)


def _read_form(module: FusedModule, own: dict[str, nn.Module]) -> _Read:
    state = module.__dict__[STATE]
    try:
        with torch.enable_grad():  # whoever reports is often within no_grad
            running, reason = choose(module, state)
    except Exception as error:  # users put anything in the place of a child; its next call fails as this does
        running, reason = None, f"a child {CHANGED} ({type(error).__name__}: {error})"
    convolutions, passes = of_form(own, state.forms[-1] if running is None else running.form)
    if running is None:
        return "", reason, convolutions._replace(fused=0), passes._replace(fused=0)
    reasons = [*state.reasons, *gates.obstacles(module, running.form)]
    if state.drop_path == "survivors" and (names := _dropped_of_all(running)):
        reasons.append(f"the branch before {', '.join(names)} runs on all samples")
    return describe(running.form), "; ".join(reasons), convolutions, passes


def _dropped_of_all(running: Running) -> list[str]:
    """The drop paths whose branches cannot run on surviving samples alone."""
    names = [site.shape.drop_path for site in running.sites if site.drop_path is not None and parts_of(site) is None]
    for call in running.form.calls:
        if isinstance(call, GatedSum):
            names += [call.drop_path] * bool(call.drop_path)
        elif isinstance(call, StockCall) and call.op == "call_module":
            names += [call.target] * drop_paths.is_one(running.block.get_submodule(call.target))
    return names


def _why_not_read(module: nn.Module) -> str:
    """Why nothing but stems of `module` is fused."""
    try:
        trace(module, stock_class(module))
    except Untraceable as error:
        return str(error)
    return "its forward was read for stems alone; call fuse() again"


def _read_stems(module: FusedStem, convolutions: int, passes: int) -> _Read:
    state = module.__dict__[STATE]
    fused: dict[int, int] = {}  # convolution -> passes behind it: one stem may be called by several methods
    replaced = [method for method in module._resnet_fused_read if module._resnet_fused_replaced(method)]
    what, reasons = [], [f"its class was given another {method} after fuse()" for method in replaced]
    for stem in state.stems:
        text = "-".join(filter(None, stem))
        try:
            site = stem_site(module, stem, state.backend)
            reason = f"{text} {CHANGED}" if site is None else module_obstacle(site)
        except Exception as error:  # as above
            reason = f"{text} {CHANGED} ({type(error).__name__}: {error})"
        if reason:
            reasons.append(reason)
        elif not replaced:
            what.append(text)
            fused |= {id(conv): 2 for conv in site.convolutions}
    shares = Share(len(fused), convolutions), Share(sum(fused.values()), passes)
    if what and any(share.fused < share.total for share in shares):
        reasons.append(_why_not_read(module))
    return ", ".join(what), "; ".join(dict.fromkeys(reasons)), *shares
