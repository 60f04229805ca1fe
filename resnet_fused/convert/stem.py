"""The stem, convolution-norm-ReLU called one after another in a model's own method.

A model's forward is too free to be traced, so its methods are rewritten instead: three consecutive calls
``x = self.conv1(x); x = self.bn1(x); x = self.relu(x)`` (or the same nested) become one call of
:meth:`FusedStem.run_stem`, in a subclass of the model's class, and so does a max pool that is called next. The rest of
each method is untouched source.
"""

from __future__ import annotations

import ast
import copyreg
import dataclasses
import inspect
import textwrap
import types

from torch import nn

from ..blocks import norms
from ..blocks.runtime import run_as_stock
from ..blocks.site import Site, input_obstacle, module_obstacle, pool_geometry, why_not_conv
from .fused_module import STATE, getstate, is_stock_forced

Triple = tuple[str, str, str]  # names of convolution (or a Sequential that ends in one), norm and ReLU
Stem = tuple[str, str, str, str]  # the same, and the max pool behind it, or an empty name


@dataclasses.dataclass
class StemState:
    """What a model with a fused stem carries; plain data."""

    stems: tuple[Stem, ...]
    backend: str

    def describe(self) -> str:
        return ", ".join("-".join(filter(None, stem)) for stem in self.stems)


def stem_site(model: nn.Module, names: Triple, backend: str) -> Site | None:
    """The chain of a stem, a Sequential's members laid out in a row; None if it is not conv-norm-ReLU throughout."""
    try:
        first, norm, act = (model.get_submodule(name) for name in names)
    except AttributeError:
        return None
    row = [*(first if type(first) is nn.Sequential else [first]), norm, act]
    steps = list(zip(row[0::3], row[1::3], row[2::3], strict=False))
    if len(row) != 3 * len(steps) or any(type(relu) is not nn.ReLU for *_, relu in steps):
        return None
    for conv, bn, _ in steps:
        if why_not_conv(conv) or norms.why_not(bn) or norms.activation_of(bn) is not None:
            return None
    containers = (first,) if type(first) is nn.Sequential else ()
    bypassed = (*(relu for *_, relu in steps), *containers)
    return Site(tuple((conv, bn) for conv, bn, _ in steps), bypassed=bypassed, backend=backend)


class FusedStem:
    """Mixin in front of a model's class whose methods call :meth:`run_stem`."""

    def run_stem(self, conv: str, norm: str, act: str, pool: str, x):
        """``pool(act(norm(conv(x))))``: fused where it can be, else by calling them."""
        state: StemState = self.__dict__[STATE]
        site = None if is_stock_forced() else stem_site(self, (conv, norm, act), state.backend)
        last = getattr(self, pool) if pool else nn.Identity()
        if site is None or module_obstacle(site) or input_obstacle(x, site):
            return last(getattr(self, act)(getattr(self, norm)(getattr(self, conv)(x))))
        if pool and pool_geometry(last) is not None:
            return run_as_stock(dataclasses.replace(site, pool=last), x)
        return last(run_as_stock(site, x))

    def __reduce_ex__(self, protocol):
        return _rebuild, (type(self).__mro__[2], self.__dict__[STATE].stems), getstate(self)


def _rebuild(stock_class: type, stems: tuple[Triple, ...]) -> nn.Module:
    return copyreg.__newobj__(_stem_class(stock_class, stems))


class _Rewriter(ast.NodeTransformer):
    """Replace the calls of the given stems in one method."""

    def __init__(self, accept, is_pool) -> None:
        self.accept = accept  # Triple -> bool
        self.is_pool = is_pool  # str -> bool
        self.found: list[Stem] = []

    def _replacement(self, names: list[str], argument: ast.expr, pool: str = "") -> ast.expr | None:
        triple = tuple(reversed(names))
        if len(triple) != 3 or not self.accept(triple):
            return None
        self.found.append((*triple, pool))
        function = ast.Attribute(ast.Name("self", ast.Load()), "run_stem", ast.Load())
        return ast.Call(function, [*(ast.Constant(name) for name in self.found[-1]), argument], [])

    def visit_Call(self, node: ast.Call) -> ast.expr:
        names, inner = [], node
        while len(names) < 3 and (name := _self_call(inner)) is not None:
            names.append(name)
            inner = inner.args[0]
        return self._replacement(names, inner) or self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.body = self._merge(node.body)
        return node

    def _merge(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Merge three consecutive ``v = self.name(v)`` statements."""
        merged, i = [], 0
        while i < len(body):
            run = body[i : i + 3]
            names = [_self_assign(statement) for statement in run]
            if (
                len(run) == 3
                and all(names)
                and len({variable for variable, _ in names}) == 1
                and (all(_argument(statement) == names[0][0] for statement in run[1:]))
            ):
                pool = self._pool(body[i + 3 : i + 4], names[0][0])
                call = self._replacement([name for _, name in reversed(names)], run[0].value.args[0], pool)
                if call is not None:
                    merged.append(ast.Assign(run[0].targets, call))
                    i += 4 if pool else 3
                    continue
            merged.append(body[i])
            i += 1
        return merged

    def _pool(self, following: list[ast.stmt], variable: str) -> str:
        """The name of the max pool that the statement after a stem calls on its result; empty if it does not."""
        for statement in following:
            assigned = _self_assign(statement)
            if assigned and assigned[0] == variable == _argument(statement) and self.is_pool(assigned[1]):
                return assigned[1]
        return ""


def _self_call(node: ast.AST) -> str | None:
    """The name in ``self.name(argument)``."""
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1:
        return None
    function = node.func
    if (
        not isinstance(function, ast.Attribute)
        or not isinstance(function.value, ast.Name)
        or function.value.id != "self"
    ):
        return None
    return function.attr


def _self_assign(node: ast.stmt) -> tuple[str, str] | None:
    """The names in ``variable = self.name(argument)``."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
        return None
    name = _self_call(node.value)
    return None if name is None else (node.targets[0].id, name)


def _argument(node: ast.Assign) -> str | None:
    argument = node.value.args[0]
    return argument.id if isinstance(argument, ast.Name) else None


def _rewrite(function: types.FunctionType, accept, is_pool) -> tuple[types.FunctionType | None, list[Stem]]:
    """`function` with its stems replaced, and which; None where there are none or its source cannot be used."""
    if function.__closure__ or hasattr(function, "__wrapped__"):
        return None, []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None, []
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        return None, []
    rewriter = _Rewriter(accept, is_pool)
    definition = rewriter.visit(definition)
    if not rewriter.found:
        return None, []
    definition.returns = None
    for argument in (*definition.args.args, *definition.args.kwonlyargs):
        argument.annotation = None
    tree.body = [definition]
    namespace: dict[str, types.FunctionType] = {}
    code = compile(ast.fix_missing_locations(tree), inspect.getsourcefile(function) or "<stem>", "exec")
    exec(code, function.__globals__, namespace)
    rewritten = namespace[function.__name__]
    rewritten.__doc__, rewritten.__defaults__, rewritten.__kwdefaults__ = (
        function.__doc__, function.__defaults__, function.__kwdefaults__,
    )  # fmt: skip
    return rewritten, rewriter.found


def _methods(stock_class: type) -> dict[str, types.FunctionType]:
    """Methods that a class or its own bases define, the most derived of each name."""
    found: dict[str, types.FunctionType] = {}
    for base in stock_class.__mro__:
        if base in (nn.Module, nn.Sequential, object):
            continue
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and not name.startswith("__"):
                found.setdefault(name, value)
    return found


_classes: dict[tuple[type, tuple[Stem, ...]], type] = {}


def _stem_class(stock_class: type, stems: tuple[Stem, ...]) -> type:
    """The subclass of `stock_class` whose methods call :meth:`FusedStem.run_stem` for `stems`; made once."""
    key = stock_class, stems
    if key not in _classes:
        body: dict[str, object] = {"__module__": __name__, "__doc__": stock_class.__doc__}
        triples, pools = [stem[:3] for stem in stems], [stem[3] for stem in stems]
        for name, function in _methods(stock_class).items():
            rewritten, _ = _rewrite(function, lambda triple: triple in triples, lambda name: name in pools)
            if rewritten is not None:
                body[name] = rewritten
        _classes[key] = type(f"Fused{stock_class.__name__}", (FusedStem, stock_class), body)
    return _classes[key]


def fuse_stem(model: nn.Module, backend: str) -> str:
    """Fuse the stem of `model`, if it has one. Returns why not, or an empty text."""

    def accept(triple: Triple) -> bool:
        return stem_site(model, triple, backend) is not None

    def is_pool(name: str) -> bool:
        return type(getattr(model, name, None)) is nn.MaxPool2d

    stems: list[Stem] = []
    for function in _methods(type(model)).values():
        stems += _rewrite(function, accept, is_pool)[1]
    if not stems:
        return "no conv-norm-ReLU calls in a row in its methods"
    unique = tuple(dict.fromkeys(stems))
    model.__dict__[STATE] = StemState(unique, backend)
    model.__class__ = _stem_class(type(model), unique)
    return ""


def unfuse_stem(model: nn.Module) -> None:
    """Undo :func:`fuse_stem`."""
    if isinstance(model, FusedStem):
        del model.__dict__[STATE]
        model.__class__ = type(model).__mro__[2]


def stem_modules(model: FusedStem) -> list[nn.Module]:
    """The modules that the stems of `model` stand in for."""
    state: StemState = model.__dict__[STATE]
    modules: list[nn.Module] = []
    for stem in state.stems:
        site = stem_site(model, stem[:3], state.backend)
        if site is not None:
            modules += [*(module for pair in site.steps for module in pair), *site.bypassed]
    return modules
