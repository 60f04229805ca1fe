"""Dense blocks: classes that are known by name, read as the program of a dense block, and the public module.

Such a block loops over its children, and its layers take lists, so that no graph of it can be traced. A class that is
listed here is therefore put to the test: a small block of that class, made of fresh modules, has to give what the
program gives, in training and in evaluation. What it gave holds for the code that it ran: at each call the methods of
both classes, and what they read of their globals, must be what they were.
"""

from __future__ import annotations

import builtins
import dataclasses
import types
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from ..models import densenet
from ..steps import Norm, StepTensors, stock
from ..steps.dense import CHECKPOINTED, KEPT, dense_program
from ..steps.layout import arrived, left
from ..steps.program import Call, Normalisation, Program
from . import norms, proven
from .runtime import run_site
from .shape import Shape, remembered
from .site import CHANGED, runnable


class Kind(NamedTuple):
    """What is known of a class of blocks, all of whose children are layers with the same names in them."""

    layer: tuple[str, str]  # their class
    memory_efficient: str  # the attribute of a layer that makes it a checkpoint
    relus: tuple[str, ...]  # what the ReLUs are called


KINDS = {
    ("torchvision.models.densenet", "_DenseBlock"): Kind(
        ("torchvision.models.densenet", "_DenseLayer"), "memory_efficient", ("relu1", "relu2")
    ),
    ("timm.models.densenet", "DenseBlock"): Kind(
        ("timm.models.densenet", "DenseLayer"), "grad_checkpointing", ("norm1.act", "norm2.act")
    ),
    ("resnet_fused.models.densenet", "DenseBlock"): Kind(
        ("resnet_fused.models.densenet", "DenseLayer"), "memory_efficient", ("relu1", "relu2")
    ),
}
NAMES = ("norm1", "conv1", "norm2", "conv2")  # of what a layer runs, in order
_LOOPS = ("items", "values", "__iter__", "__len__")  # by which a block finds its layers
_OUTSIDE = tuple(
    (place, name, getattr(place, name))
    for place, name in ((torch, "cat"), (checkpoint, "checkpoint"), *((nn.ModuleDict, name) for name in _LOOPS))
)
Code = tuple[type, str, types.FunctionType, types.CodeType, tuple, tuple[tuple[str, object], ...]]
#: Of the classes of layers, by that of the block: the code that was put to the test, and what the test says.
_tested: weakref.WeakKeyDictionary[type, dict[type, tuple[list[Code], str]]] = weakref.WeakKeyDictionary()


def kind_of(cls: type) -> Kind | None:
    """What is known of a class of blocks; None for every other."""
    return KINDS.get(proven.own_kind(cls))


@remembered
def shapes_of(names: tuple[str, ...], layer: str, relus: tuple[str, ...], saves: str) -> tuple[Shape]:
    """The shape of a block whose layers have these `names` and are of the class named `layer`."""
    modules, bypassed = [], [(name, layer) for name in names]
    for name in names:
        modules += [*(f"{name}.{own}" for own in NAMES), ""]
        bypassed += [(f"{name}.{relu}", "ReLU") for relu in relus]
    return (Shape(dense_program(len(names), saves), tuple(modules), tuple(bypassed)),)


def saves_of(block: nn.Module, kind: Kind, otherwise: str = KEPT) -> str:
    """What the program of `block` saves: as its layers say now, `otherwise` where they do not."""
    flags = [bool(layer.__dict__.get(kind.memory_efficient)) for layer in block._modules.values()]
    return CHECKPOINTED if flags and all(flags) else otherwise


def why_not(block: nn.Module, cls: type) -> str:
    """Why `block`, of the stock class `cls`, is not read as a dense block; empty if it is."""
    kind = kind_of(cls)
    if kind is None:
        return f"{cls.__name__} is not known as a dense block"
    layers = [*block._modules.values()]
    if not layers or any(layer is None or proven.kind(layer) != kind.layer for layer in layers):
        return f"its children are not all of the class {kind.layer[1]}"
    for layer in layers:
        for i in (1, 2):
            norm, conv = layer._modules.get(f"norm{i}"), layer._modules.get(f"conv{i}")
            if norm is None or conv is None:
                return f"a layer without norm{i} or conv{i}"
            act = norms.activation_of(norm)
            if norms.why_not(norm) or (act is not None and type(act) is not nn.ReLU):
                return norms.why_not(norm) or f"its norms' activation is {type(act).__name__}, not ReLU"
    return code_obstacle(cls, type(layers[0]))


def obstacle(block: nn.Module, cls: type, shape: Shape) -> str:
    """Why `shape`, made of `block` before, is not what the block does now, beside what its site tells."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "traced for a graph of stock operations"
    kind, saves, layers = kind_of(cls), shape.program.dense, [*block._modules.values()]
    if tuple(block._modules) != tuple(name for name, _ in shape.bypassed[: len(shape.program.nodes) // 5]):
        return f"its layers: {CHANGED}"
    hidden = [name for name in _LOOPS if name in block.__dict__]
    if hidden or proven.exchanged(_OUTSIDE):
        return "a function by which it finds its layers, or joins what they make, was replaced"
    if any(getattr(cls, name) is not getattr(nn.ModuleDict, name) for name in _LOOPS):
        return f"{cls.__name__} has its own way to find its layers"
    if any(layer is None or proven.kind(layer) != kind.layer for layer in layers):
        return f"its layers: {CHANGED}"
    for layer in layers:
        own = layer.__dict__
        if type(layer) is not type(layers[0]) or "drop_rate" not in own:
            return f"its layers: {CHANGED}"
        if own["drop_rate"] > 0 and own["training"]:
            return "dropout behind its layers, in training"
        if bool(own.get(kind.memory_efficient)) != (saves == CHECKPOINTED):
            return f"{kind.memory_efficient} {CHANGED}"
    return code_obstacle(cls, type(layers[0]))


def code_obstacle(block: type, layer: type) -> str:
    """Why classes with the names of a known block and its layers do not do what is known of them."""
    known = _tested.setdefault(block, {}).get(layer)
    if known is not None and all(map(_holds, known[0])):
        return known[1]
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return f"{block.__name__} was not put to the test yet, which no mode is to see"
    code = [*_read(block, ("forward",)), *_read(layer, ("forward", *proven.DENSE_LAYERS[proven.own_kind(layer)]))]
    reason = "its methods are no plain functions" if None in code else _test(block, layer)
    _tested[block][layer] = [item for item in code if item is not None], reason
    return reason


def _read(cls: type, names: tuple[str, ...]) -> Iterator[Code | None]:
    """The methods of `cls` with all that decides what they do; None for what is no function."""
    for name in names:
        function = getattr(cls, name, None)
        if not isinstance(function, types.FunctionType):
            yield None
            continue
        reads = tuple((found, _global(function, found)) for found in sorted(_names(function.__code__)))
        yield cls, name, function, function.__code__, function.__defaults__, reads


def _names(code: types.CodeType) -> set[str]:
    """Names that may be global in a function and those within it."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _global(function: types.FunctionType, name: str) -> object:
    return function.__globals__.get(name, getattr(builtins, name, None))


def _holds(item: Code) -> bool:
    cls, name, function, code, defaults, reads = item
    same = getattr(cls, name, None) is function and function.__code__ is code and function.__defaults__ is defaults
    return same and all(_global(function, found) is value for found, value in reads)


def _test(block: type, layer: type) -> str:
    """Run a small block of these classes and its program; why they are not the same, or an empty text."""
    kind = kind_of(block)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            for training in (True, False):
                sample = _sample(block, layer, kind).train(training)
                x = torch.linspace(-1, 1, 2 * 3 * 3 * 3, dtype=torch.float64, device="cpu").sin().view(2, 3, 3, 3)
                call = Call(_program(training), x, _tensors(sample))
                expected, got = stock.program_output(call), block.forward(sample, x.clone())
                if got.shape != expected.shape or not torch.allclose(got, expected, 1e-9, 1e-9):
                    return f"{block.__name__} does not compute what a dense block of its name does"
    except Exception as error:  # whatever code of that name does
        return f"{block.__name__} could not be put to the test ({type(error).__name__}: {error})"
    return ""


def _sample(block: type, layer: type, kind: Kind) -> nn.Module:
    """A block of two small layers, made without running anybody's constructor or the random generator."""
    sample = block.__new__(block)
    nn.Module.__init__(sample)
    channels = 3
    for i in range(2):
        made = layer.__new__(layer)
        nn.Module.__init__(made)
        made.__dict__.update({"drop_rate": 0.0, kind.memory_efficient: False})
        norms_of = _activated if "." in kind.relus[0] else nn.BatchNorm2d
        sizes = (channels, (4, channels, 1, 1)), (4, (2, 4, 3, 3))
        for j, (width, shape) in enumerate(sizes, 1):
            made.add_module(f"norm{j}", norms_of(width, dtype=torch.float64, device="cpu"))
            options = {"bias": False, "dtype": torch.float64, "device": "cpu", "padding": j - 1}
            conv = nn.utils.skip_init(nn.Conv2d, shape[1], shape[0], shape[2], **options)
            made.add_module(f"conv{j}", conv)
            if norms_of is nn.BatchNorm2d:
                made.add_module(f"relu{j}", nn.ReLU(inplace=True))
        sample.add_module(f"layer{i}", made)
        channels += 2
    for i, t in enumerate((*sample.parameters(), *sample.buffers())):
        if t.is_floating_point():
            t.data.copy_(torch.linspace(0.3, 1.7, t.numel(), dtype=t.dtype, device="cpu").add(i).sin().view_as(t).abs())
    return sample


def _program(training: bool) -> Program:
    """The program of two layers whose norms are in training, or in evaluation."""
    program, norm = dense_program(2), Norm(batch_stats=training)
    nodes = [
        dataclasses.replace(node, norm=norm) if isinstance(node, Normalisation) else node for node in program.nodes
    ]
    return dataclasses.replace(program, nodes=tuple(nodes))


def _activated(width: int, **options) -> nn.Module:
    """timm's norm with an activation."""
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(width, **options)


def _tensors(sample: nn.Module) -> list[StepTensors]:
    found = []
    for layer in sample._modules.values():
        for name in NAMES:
            module = layer._modules[name]
            vectors = () if isinstance(module, nn.Conv2d) else norms.tensors(module)
            found.append(StepTensors(None, None, *vectors) if vectors else StepTensors(module.weight))
        found.append(StepTensors(None))
    return found


class FusedDenseBlock(densenet.DenseBlock):
    """A dense block as one autograd node on one buffer: every layer reads a prefix of it and writes a slice.

    Args, parameter names and errors are torchvision's ``_DenseBlock``: `num_layers`, `num_input_features`, `bn_size`,
    `growth_rate`, `drop_rate`, `memory_efficient` (compute again in backward what lies between the convolutions of a
    layer). x: ``[N, num_input_features, H, W]``, result ``[N, num_input_features + num_layers * growth_rate, H, W]``
    in the layout of x. Fused in float32 on a CPU with AVX-512 or AVX2, and on GPUs with Triton in float32, bfloat16 and
    float16; stock elsewhere and, in training, with a `drop_rate`. The result is kept for backward: where it was written
    to, backward raises. Paper: Huang et al., 2017, https://arxiv.org/abs/1608.06993.
    """

    def forward(self, x: Tensor) -> Tensor:
        names, kind = tuple(self._modules), kind_of(densenet.DenseBlock)
        shapes = shapes_of(names, kind.layer[1], kind.relus, saves_of(self, kind))
        if not names or obstacle(self, densenet.DenseBlock, shapes[0]):
            return super().forward(x)
        site = runnable(self, shapes, x)
        out = None if site is None else run_site(site, arrived(x))
        return super().forward(x) if out is None else left(out)
