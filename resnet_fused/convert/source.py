"""The definition of a function in its file, proven by its code, and the function made again from a changed one.

Nothing is believed about a source file but what compiles to the very code that runs: the file is compiled as it stands,
and the code object in the function's place must equal the function's, with its constants, names, free variables, flags
and lines. A file edited since, a function somebody generated, or one compiled in another way is thus not recognised. A
changed definition is then compiled where the first one stood, so that private names, ``__class__``, closures and
``from __future__`` mean what they meant.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import linecache
import types
import warnings
from collections.abc import Iterator
from typing import NamedTuple


class Definition(NamedTuple):
    """A ``def`` statement in the tree of its module, both for the caller to change."""

    node: ast.FunctionDef
    tree: ast.Module
    within: str  # the class around it, or an empty name

    def mangled(self, name: str) -> str:
        """What the attribute `name` is called in the class around `node`."""
        private = name.startswith("__") and not name.endswith("__")
        within = self.within.lstrip("_")
        return f"_{within}{name}" if private and within else name


def find(function: types.FunctionType) -> Definition | None:
    """The definition of `function`; None where no source at hand compiles to it, or it has decorators."""
    code = function.__code__
    for source in _sources(function):
        if _same(_pick(_codes(source, code.co_filename), code), code):
            with _quiet():
                tree = ast.parse(source)
            for node, within in _definitions(tree):
                if (node.name, node.lineno) == (code.co_name, code.co_firstlineno):
                    return Definition(node, tree, within)
    return None


def recompile(function: types.FunctionType, found: Definition) -> types.FunctionType | None:
    """`function` as its definition is now; None where its free variables would be others."""
    code = _pick(_compiled(found.tree, function.__code__.co_filename), function.__code__)
    if code is None or code.co_freevars != function.__code__.co_freevars:
        return None
    made = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    functools.update_wrapper(made, function)
    made.__dict__, made.__kwdefaults__ = {**function.__dict__}, function.__kwdefaults__
    return made


def _sources(function: types.FunctionType) -> Iterator[str]:
    """The file of `function` as Python has it cached, and as it is now if that is something else."""
    filename = function.__code__.co_filename
    cached = linecache.getlines(filename, function.__globals__)
    yield "".join(cached)
    linecache.checkcache(filename)
    if (now := linecache.getlines(filename, function.__globals__)) != cached:
        yield "".join(now)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of a compiler: the user has seen them on import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.lru_cache(maxsize=8)
def _codes(source: str, filename: str) -> tuple[types.CodeType, ...]:
    """The code objects of a module; none where it is not Python."""
    try:
        return _compiled(source, filename)
    except (SyntaxError, ValueError, RecursionError):
        return ()


def _compiled(module: str | ast.Module, filename: str) -> tuple[types.CodeType, ...]:
    """The code objects of all functions and classes in `module`."""
    with _quiet():
        todo = [compile(module, filename, "exec", dont_inherit=True)]
    codes = []
    while todo:
        inner = [const for const in todo.pop().co_consts if isinstance(const, types.CodeType)]
        codes += inner
        todo += inner
    return tuple(codes)


def _pick(codes: tuple[types.CodeType, ...], like: types.CodeType) -> types.CodeType | None:
    """The one code object with the name and the first line of `like`."""
    found = [c for c in codes if c.co_name == like.co_name and c.co_firstlineno == like.co_firstlineno]
    return found[0] if len(found) == 1 else None


def _same(code: types.CodeType | None, other: types.CodeType) -> bool:
    """Equal in what Python compares (with the codes within), and in what it does not in every version."""
    return code == other and code.co_freevars == other.co_freevars and [*code.co_lines()] == [*other.co_lines()]


def _definitions(node: ast.AST, within: str = "") -> Iterator[tuple[ast.FunctionDef, str]]:
    """All ``def`` statements in `node`, each with the class around it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child, within
        yield from _definitions(child, child.name if isinstance(child, ast.ClassDef) else within)
