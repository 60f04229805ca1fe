"""The modules that a program stands in for, and whether this call may bypass them.

A fused block owns its convolutions and norms as before and calls none of them. Whatever would have happened in those
calls (hooks, pruning, a replaced child or method) must still happen, so each call asks :func:`module_obstacle`, and of
its input :func:`value_obstacle`, first and runs the stock forward where there is one.
"""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import Tensor, nn

from ..steps import Average, Conv, Norm, Pool, StepTensors
from ..steps.program import Addition, Averaging, Concatenation, Convolution, Node, Normalisation, Pooling
from . import layers, norms, proven
from .inputs import input_obstacle, is_odd, is_plain
from .shape import Shape
from .unchanged import Forms, Unchanged

KEPT = 8  # shapes of one block whose modules are kept
CHANGED = "was changed after fuse(); call fuse() again"


class Kept:
    """What was found of a site, for as long as its modules are what they were, or by their settings."""

    def __init__(self) -> None:
        self.unchanged: Unchanged | bool | None = None  # False: its modules are read at every call
        self.by_settings: dict[tuple, object] = {}
        self.lowered = Forms()


@dataclasses.dataclass(eq=False)
class Site:
    """The modules of a :class:`Shape` in a block."""

    shape: Shape
    modules: tuple[nn.Module | None, ...]  # of each node; None for additions, and averages that a function takes
    bypassed: tuple[nn.Module, ...] = ()
    backend: str = "auto"
    precision: str = "default"
    kept: Kept | None = dataclasses.field(default=None, repr=False)  # None: nothing is kept, while a graph is traced
    survivors: bool = False  # whether a branch that a drop path drops runs on the samples alone that survive
    #: Of a site that does, see :mod:`.survivors`: in a tuple, once it was looked for.
    parts: tuple | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        #: All nodes and their modules, and those that have one.
        self.pairs = list(zip(self.shape.program.nodes, self.modules, strict=True))
        self.nodes = [(node, module) for node, module in self.pairs if module is not None]
        self.convolutions = [module for node, module in self.nodes if isinstance(node, Convolution)]
        self.norms = [module for node, module in self.nodes if isinstance(node, Normalisation)]
        self.activated = any(node.act is not None for node, _ in self.nodes if isinstance(node, Normalisation))
        # Who reads the input, or averages of it, which have as many channels.
        program, weighs = self.shape.program, Convolution | Normalisation
        entering = {0, *(value for value in program.readers(0) if isinstance(program.maker(value), Averaging))}
        first = (pair for pair in self.nodes if isinstance(pair[0], weighs) and not entering.isdisjoint(pair[0].reads))
        self._first = next(first)

    @property
    def channels(self) -> int:
        """How many the input has."""
        return _entering(*self._first)

    @property
    def drop_path(self) -> nn.Module | None:
        names = [name for name, _ in self.shape.bypassed]
        return self.bypassed[names.index(self.shape.drop_path)] if self.shape.drop_path else None

    def settings(self) -> tuple[Conv | Norm | Pool | Average | None, ...]:
        """What each node's module is set to now."""
        return tuple(None if module is None else _READ[type(node)][1](module) for node, module in self.pairs)

    def tensors(self) -> list[StepTensors]:
        """The tensors of each node."""
        found = []
        for node, module in self.pairs:
            if isinstance(node, Convolution):
                found.append(StepTensors(module.weight, module.bias))
            elif isinstance(node, Normalisation):
                found.append(StepTensors(None, None, *norms.tensors(module)))
            else:
                found.append(StepTensors(None))
        return found


#: Why a node's module must be called, and what it is set to.
_READ = {
    Convolution: (layers.why_not_conv, layers.conv_geometry),
    Normalisation: (lambda module: norms.why_not(module) or norms.obstacle(module), norms.settings),
    Pooling: (layers.why_not_pool, layers.pool_geometry),
    Averaging: (layers.why_not_average, layers.average_geometry),
}


def _entering(node: Node, module: nn.Module) -> int:
    """How many channels a convolution or norm takes."""
    return module.weight.shape[1] * module.groups if isinstance(node, Convolution) else norms.channels(module)


def find(block: nn.Module, name: str) -> nn.Module | None:
    """The module of that dotted name; None where there is none."""
    found: nn.Module | None = block
    for atom in name.split("."):
        found = None if found is None else found._modules.get(atom)
    return found


def runnable(block: nn.Module, shapes: tuple[Shape], x: object) -> Site | None:
    """The site of the only one of `shapes`, of a module built fused; None where its modules are to be called on `x`."""
    site = (sites_in(block, shapes) or [None])[0]
    return site if site is not None and not module_obstacle(site) and not value_obstacle(x, site) else None


#: Of each block, by the ids of their shapes: these, the names of what holds modules, whom they held, the sites.
_looked: weakref.WeakKeyDictionary[nn.Module, dict[int, tuple]] = weakref.WeakKeyDictionary()


def sites_in(
    block: nn.Module,
    shapes: tuple[Shape, ...],
    backend: str = "auto",
    names: tuple[str, ...] = (),
    precision: str = "default",
    survivors: bool = False,
) -> list[Site] | None:
    """The sites of `shapes`, the same again until a child was replaced. `names`: of modules that must be there too.

    None where one is missing.
    """
    looked = None if torch.compiler.is_compiling() else _looked.setdefault(block, {})
    known = looked and looked.get(id(shapes))
    settings = backend, precision, survivors
    if known and known[0] is shapes and known[2] == _children(block, known[1], settings):
        return known[3]
    wanted = (*names, *(name for shape in shapes for name in shape.modules))
    sites = [] if all(find(block, name) is not None for name in wanted) else None
    for shape in shapes if sites is not None else ():
        modules = tuple(find(block, name) if name else None for name in shape.names)
        bypassed = tuple(find(block, name) for name, _ in shape.bypassed)
        kept = None if looked is None else Kept()
        sites.append(Site(shape, modules, bypassed, backend, precision, kept, survivors))
    if looked is not None:
        if len(looked) >= KEPT:  # of forms that nobody has any more
            looked.clear()
        parents = tuple(sorted({name.rpartition(".")[0] for name in wanted} - {""}))
        looked[id(shapes)] = shapes, parents, _children(block, parents, settings), sites
    return sites


def _children(block: nn.Module, parents: tuple[str, ...], settings: tuple) -> list:
    found = [*settings, *map(id, block._modules.values())]
    for name in parents:
        holder = find(block, name)
        found += [] if holder is None else map(id, holder._modules.values())
    return found


def module_obstacle(site: Site) -> str:
    """Why the modules of `site` must be called one by one; empty if they may be bypassed."""
    if layers.globally_hooked():
        return "global module hooks"
    if proven.functions_exchanged():
        return "a function of torch that the modules call was replaced"
    if site.activated and proven.activations_exchanged():
        return "an activation function of torch was replaced"
    kept = None if torch.compiler.is_compiling() else site.kept
    if kept is not None and kept.unchanged and kept.unchanged.holds():
        return ""
    reason = _obstacle_read(site)
    if kept is not None and kept.unchanged is not False and not reason:
        known = Unchanged([module for _, module in site.nodes], site.bypassed)
        if known.is_plain():
            kept.unchanged = known if known.is_complete() else False
    return reason


def _obstacle_read(site: Site) -> str:
    """:func:`module_obstacle` by reading every module."""
    for node, module in site.nodes:
        reason = _READ[type(node)][0](module)
        if reason:
            return reason
        if layers.hooked(module):
            return "hooks on a convolution, batch norm or pool"
        act = norms.activation_of(module) if isinstance(node, Normalisation) else None
        if act is not None and all(act is not other for other in site.bypassed):
            return "a norm with an activation of its own"
    for (name, kind), module in zip(site.shape.bypassed, site.bypassed, strict=True):
        if layers.kind_of(module) != kind:
            return f"{name} {CHANGED}"
        reason = layers.why_not_passed(module)
        if reason or layers.hooked(module):
            return reason or "hooks on an activation or shortcut"
    return _tensor_obstacle(site)


def _tensor_obstacle(site: Site) -> str:
    """Why the parameters are not those of one program: another class, device, dtype or shape than fit together."""
    program, first = site.shape.program, site.convolutions[0].weight
    channels: list[int | None] = [None] * program.inputs  # of each value; None: of an input, as its first reader says
    for node, module in site.pairs:
        if isinstance(node, Concatenation):
            channels.append(sum(channels[value] for value in node.reads))
            continue
        entering = channels[node.reads[0]]
        if entering is None and isinstance(node, Averaging):
            channels[node.reads[0]] = entering = site.channels
        if isinstance(node, Addition | Pooling | Averaging):
            channels.append(entering)
            continue
        is_conv = isinstance(node, Convolution)
        weight, vectors = (module.weight, (module.bias,)) if is_conv else (None, norms.vectors(module))
        if is_conv and weight.dim() != 4:
            return "a weight of another form"
        takes = _entering(node, module)
        if entering is None:
            channels[node.reads[0]] = entering = takes
        if takes != entering:
            return "a module that does not take what comes before it"
        channels.append(takes if weight is None else weight.shape[0])
        reason = _parameter_obstacle(weight, vectors, channels[-1], first)
        if reason:
            return reason
    return ""


def _parameter_obstacle(weight: Tensor | None, vectors: tuple[Tensor | None, ...], channels: int, first: Tensor) -> str:
    """Why a node's parameters do not fit.

    A convolution's have the dtype of `first`; a norm's may be float32 where that has 16 bits, all of them or none.
    """
    dtype, is_conv = first.dtype, weight is not None
    allowed = (dtype,) if is_conv or dtype.itemsize != 2 else (dtype, torch.float32)
    if not is_conv and len({t.dtype for t in vectors if t is not None}) > 1:
        return "a batch norm of several dtypes"
    for t in (weight, *vectors):
        if t is None:
            continue
        if t.device != first.device:
            return "parameters on several devices"
        if not is_plain(t):
            return f"a parameter of class {type(t).__name__}"
        if is_odd(t):
            return "a parameter of an unusual layout"
        if t.dtype not in allowed:
            return "parameters of different dtypes"
        if t is not weight and (t.dim() != 1 or t.numel() != channels):
            return "a norm and a convolution of different widths"
    return ""


def value_obstacle(x: object, site: Site, channels: bool = True) -> str:
    """Why `site` must not run on `x`, whose modules may be bypassed; `channels`: whether it reads that itself."""
    return input_obstacle(x, site.convolutions[0].weight, site.channels if channels else None)
