"""Modules that multiply their input by a factor made of its means over pixels: squeeze-and-excitation and its kin.

Such a module's own forward is read as a graph, as a block's is (:mod:`.trace`), and taken for a gate if it is this and
nothing else: one mean over all pixels of its input, whatever makes a factor of that, and the product with the input.
What makes the factor stays stock calls, so hooks on these modules run, and they may be replaced. The module's own
forward is bypassed, which each call must find unchanged; where not, it is called as a whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from ..blocks import drop_paths, proven
from ..blocks.inputs import is_plain
from ..blocks.layers import hooked, why_not_passed
from ..ops import stat_dtype
from ..plan import choose, gates
from ..steps.gate import Gated, gate, squeeze
from ..steps.layout import Placed, arrived, left
from . import opened
from .instructions import Form, GateCall, GatedSum, Opened, StockCall, plain
from .outside import called
from .swap import stock_class
from .trace import Untraceable, trace


def _is_mean(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node is the mean over all pixels of its first argument."""
    if node.op == "call_module":
        return len(node.args) == 1 and not node.kwargs and _pools(module.get_submodule(node.target))
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    if called(node) == "adaptive_avg_pool2d":
        return len(node.args) == 2 and not node.kwargs and node.args[1] in (1, (1, 1), [1, 1])
    if called(node) != "mean" or not given.keys() <= {"dim", "keepdim"} or len(node.args) > 3:
        return False
    dim = given.get("dim")
    whole = isinstance(dim, tuple | list) and len(dim) == 2 and all(type(d) is int for d in dim)
    return whole and {d % 4 for d in dim} == {2, 3} and given.get("keepdim", False) in (True, False)


def _pools(module: nn.Module | None) -> bool:
    """Whether a module is the unchanged mean over all pixels."""
    if type(module) is not nn.AdaptiveAvgPool2d or proven.why_changed(module, nn.AdaptiveAvgPool2d):
        return False
    return module.output_size in (1, (1, 1)) and not hooked(module)


def _factor(product: object, source: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """What `source` is multiplied by, and the ``expand_as`` of it, if there is one: it does nothing more."""
    if not isinstance(product, fx.Node) or called(product) != "mul" or len(product.args) != 2 or product.kwargs:
        return None
    others = [arg for arg in product.args if arg is not source]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or len(others[0].users) != 1:
        return None
    factor = others[0]
    return (factor.args[0], factor) if called(factor) == "expand_as" and factor.args[1] is source else (factor, None)


def _parts(module: nn.Module, graph: fx.Graph) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
    """The mean, the factor, and the nodes between them, of a graph that is a gate's.

    Raises:
        Untraceable: it is none, with the reason.
    """
    source, *nodes, output = graph.nodes
    product = output.args[0]
    if (found := _factor(product, source)) is None:
        raise Untraceable("its forward does not end in its input times a factor")
    factor, expanded = found
    sizes = [n for n in source.users if called(n) == "size" or (called(n) == "getattr" and n.args[1] == "shape")]
    means = [node for node in source.users if node not in (product, expanded, *sizes)]
    if len(means) != 1 or not _is_mean(module, means[0]):
        raise Untraceable("its forward reads more of its input than one mean over all pixels")
    return means[0], factor, [node for node in nodes if node not in (product, expanded, means[0])]


def read(module: nn.Module, node: fx.Node, summed: bool) -> GateCall:
    """The instruction for a gate that `node`, a call of `module`, stands for. `summed`: see :class:`GateCall`.

    Raises:
        Untraceable: it is none that is known for sure, with the reason.
    """
    read = opened.read(node.target, module)
    mean, factor, inner = _parts(module, trace(module, stock_class(module), whole=True))
    keeps = mean.op == "call_module" or called(mean) == "adaptive_avg_pool2d"
    keeps = keeps or dict(zip(("dim", "keepdim"), mean.args[1:], strict=False)).get("keepdim", False)
    return GateCall(
        stock=StockCall(node.op, node.target, plain(node.args), (), node.name),
        kind=read.kind,
        code=read.code,
        traced=read.traced,
        outside=read.outside,
        pool=mean.target if mean.op == "call_module" else "",
        source=next(iter(mean.graph.nodes)).name,
        mean=mean.name,
        keeps=bool(keeps or mean.kwargs.get("keepdim", False)),
        calls=tuple(StockCall(n.op, n.target, plain(n.args), tuple(plain(n.kwargs).items()), n.name) for n in inner),
        factor=factor.name,
        input=node.args[0].name,
        output=node.name,
        summed=summed,
    )


def obstacle(block: nn.Module, call: GateCall) -> str:
    """Why the module of a gate must be called as a whole; empty if its forward may be bypassed."""
    module = block.get_submodule(call.stock.target)
    read = Opened(call.stock.target, call.kind, call.code, call.traced, call.outside)
    if reason := opened.obstacle(module, read):
        return reason
    if call.pool and not _pools(module._modules.get(call.pool)):
        return f"the mean in {call.stock.target} was changed after fuse(), or has hooks"
    return ""


def run(block: nn.Module, call: GateCall, y: object, backend: str, run_stock: Callable) -> object:
    """The gated value, its product perhaps not yet written; None where the module is to be called as a whole.

    `run_stock`: of a module, a call in it and the values that this reads.
    """
    made = isinstance(y, Placed)  # by a program: stock modules may have hooks that keep what they return
    y = y if made else arrived(y) if isinstance(y, Tensor) else None
    images = y is not None and is_plain(y.value) and y.value.dim() == 4 and y.value.is_floating_point()
    if not images or y.value.numel() == 0 or not y.value.is_contiguous(memory_format=torch.channels_last):
        return None
    if obstacle(block, call):
        return None
    if reason := gates.obstacle(y.value, backend):
        choose.tell(f"{call.stock.target}: stock ({reason})")
        return None
    module = block.get_submodule(call.stock.target)
    y, mean, link = squeeze(y, backend)
    values = {call.source: y.value, call.mean: mean if call.keeps else mean.flatten(1)}
    for inner in call.calls:
        values[inner.output] = run_stock(module, inner, values)
    factor = values[call.factor]
    if choose.observers:
        inside = [f"{call.stock.target}.{inner.target}" for inner in call.calls if inner.op == "call_module"]
        again = "; what it is of is made again in backward" if link is not None and link.zeros is not None else ""
        choose.tell(f"mean over pixels; opaque {', '.join(inside) or 'functions'}{again}")
    n, c = y.value.shape[:2]
    like = isinstance(factor, Tensor) and is_plain(factor) and factor.device == y.value.device
    if not like or factor.shape != (n, c, 1, 1) or torch.promote_types(factor.dtype, mean.dtype) != mean.dtype:
        ones = torch.ones((n, c), dtype=stat_dtype(mean.dtype), device=mean.device)
        return left(Gated(y, link, ones, backend).written()) * factor
    gated = Gated(y, link, factor.reshape(n, c).to(stat_dtype(mean.dtype)).contiguous(), backend, made)
    return gated if call.summed else gated.written()


def obstacles(block: nn.Module, form: Form) -> list[str]:
    """Why modules that the gates of a form would bypass are called now."""
    found = [obstacle(block, call) for call in form.calls if isinstance(call, GateCall)]
    found += [_sum_obstacle(block, call) for call in form.calls if isinstance(call, GatedSum)]
    return [reason for reason in found if reason]


def _sum_obstacle(block: nn.Module, call: GatedSum) -> str:
    """Why the sum of a gated value, or the ReLU behind it, must be called; empty if not."""
    for stock in call.stock:
        if stock.op == "call_module":
            module = block.get_submodule(stock.target)
            if stock.target == call.drop_path:
                if not drop_paths.is_one(module) or why_not_passed(module) or hooked(module):
                    return f"{stock.target} was changed after fuse(), or has hooks"
            elif type(module) is not nn.ReLU or proven.why_changed(module, nn.ReLU) or hooked(module):
                return f"{stock.target} was changed after fuse(), or has hooks"
    return ""


def run_sum(block: nn.Module, call: GatedSum, gated: object, other: object) -> Placed | None:
    """The sum of a gated value and its ReLU, in the pass of the product; None where stock is to run them.

    A drop path between draws as stock's does, which alone draws between where it stood and here.
    """
    if not isinstance(gated, Gated) or _sum_obstacle(block, call):
        return None
    other = arrived(other) if isinstance(other, Tensor) else other
    y, t = gated.y.value, other.value if isinstance(other, Placed) else None
    if t is None or not is_plain(t) or (t.shape, t.dtype, t.device) != (y.shape, y.dtype, y.device):
        return None
    choose.tell("gate with sum, ReLU" if call.relu else "gate with sum")
    sampled = drop_paths.drawn(block.get_submodule(call.drop_path), y, y.dtype) if call.drop_path else None
    if sampled is not None:
        gated = gated._replace(factor=gated.factor * sampled.to(gated.factor.dtype)[:, None])
    return gate(gated, other, call.relu, call.other_first)
