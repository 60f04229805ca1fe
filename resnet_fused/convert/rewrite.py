"""Rewrite the stems in one method: the calls as they were, behind a question whether they may be run fused."""

from __future__ import annotations

import ast
import copy
import inspect
import types
from collections.abc import Callable, Iterator

from .source import Definition

#: Names of a convolution (or a Sequential that ends in one), a norm, a ReLU, and a max pool or an empty name.
Stem = tuple[str, str, str, str]

_OWN_SCOPE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_OWN_SCOPE += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_UNUSUAL = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Rewriter:
    """Replace the calls of the accepted stems in the method that `definition` defines."""

    def __init__(self, definition: Definition, code: types.CodeType, accept: Callable[[Stem], bool]) -> None:
        self.definition = definition
        self.accept = accept
        self.found: list[Stem] = []
        self.receiver = code.co_varnames[0] if code.co_argcount else ""
        # Nothing but the method's own statements can read or write these: no closure, no global.
        self.locals = set(code.co_varnames) - set(code.co_cellvars)
        self.unusual = bool(code.co_flags & _UNUSUAL) or _is_bound_again(definition.node, self.receiver)

    def rewrite(self) -> bool:
        """Change the definition; whether there is anything to change."""
        if not self.unusual:
            self.definition.node.body = self._statements(self.definition.node.body)
        return bool(self.found)

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, _OWN_SCOPE):
            return node
        chain, argument = self._chain(node)
        if self._is_local(argument) and (stem := self._stem(chain)):
            return _at(node, ast.IfExp(*self._calls(stem, argument), node))
        return self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, field, self._statements(value))
            elif isinstance(value, list):
                setattr(node, field, [self.visit(item) if isinstance(item, ast.AST) else item for item in value])
            elif isinstance(value, ast.AST):
                setattr(node, field, self.visit(value))
        return node

    def _statements(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """`body` with its stems merged, those of single statements and of several in a row."""
        merged, i = [], 0
        while i < len(body):
            length, stem, argument = self._stem_at(body[i : i + 4])
            if stem is None:
                merged.append(self.visit(body[i]))
                i += 1
                continue
            runs, run = self._calls(stem, argument)
            fused = ast.Assign([copy.deepcopy(body[i].targets[0])], run)
            merged.append(_at(body[i], ast.If(runs, [fused], body[i : i + length])))
            i += length
        return merged

    def _stem_at(self, statements: list[ast.stmt]) -> tuple[int, Stem | None, ast.expr | None]:
        """The longest stem that the first of `statements` make, how many they are, and its input."""
        best, names, first = (0, None, None), [], None
        for count, statement in enumerate(statements, 1):
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                break
            target, (chain, argument) = statement.targets[0], self._chain(statement.value)
            if not chain or not self._is_local(target) or not self._is_local(argument):
                break
            if count == 1:
                first = target.id, argument
            elif (target.id, argument.id) != (first[0], first[0]):
                break
            names += chain
            if (stem := self._stem(names)) is not None:
                best = count, stem, first[1]
        return best

    def _stem(self, names: list[str]) -> Stem | None:
        stem: Stem = (*names, "")[:4]
        return stem if len(names) in (3, 4) and self.accept(stem) else None

    def _chain(self, node: ast.expr) -> tuple[list[str], ast.expr]:
        """The names in ``self.c(self.b(self.a(argument)))``, the innermost first, and the argument."""
        names: list[str] = []
        while isinstance(node, ast.Call) and not node.keywords and len(node.args) == 1:
            function = node.func
            if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
                break
            if function.value.id != self.receiver or isinstance(node.args[0], ast.Starred):
                break
            names.insert(0, self.definition.mangled(function.attr))
            node = node.args[0]
        return names, node

    def _is_local(self, node: ast.expr | None) -> bool:
        return isinstance(node, ast.Name) and node.id in self.locals

    def _calls(self, stem: Stem, argument: ast.Name) -> Iterator[ast.expr]:
        """The question whether a stem runs, and its run."""
        self.found.append(stem)
        for name in ("_resnet_fused_runs", "_resnet_fused_run"):
            method = ast.Attribute(ast.Name(self.receiver, ast.Load()), name, ast.Load())
            yield ast.Call(method, [ast.Constant(stem), ast.Name(argument.id, ast.Load())], [])


def _is_bound_again(definition: ast.FunctionDef, name: str) -> bool:
    """Whether anything in a method may bind `name`, its first parameter, anew; also where that is not its name."""
    parameters = [*definition.args.posonlyargs, *definition.args.args]
    if not parameters or parameters[0].arg != name:
        return True
    for node in ast.walk(definition):
        reads = isinstance(node, ast.Attribute | ast.Constant | ast.keyword) or node is parameters[0]
        if reads or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)):
            continue
        if any(name in value if isinstance(value, list) else name == value for _, value in ast.iter_fields(node)):
            return True
    return False


def _at(where: ast.AST, node: ast.AST) -> ast.AST:
    """`node`, its new nodes placed in the lines of `where`."""
    return ast.fix_missing_locations(ast.copy_location(node, where))
