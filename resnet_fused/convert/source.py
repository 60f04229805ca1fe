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
import copy
import functools
import linecache
import types
import warnings
from collections.abc import Iterator
from typing import NamedTuple


class Definition(NamedTuple):
    """A ``def`` statement and where it stands."""

    node: ast.FunctionDef
    filename: str
    path: tuple[tuple[ast.AST, str, int], ...]  # from the module to `node`: parent, its field, index in that

    def mangled(self, name: str) -> str:
        """What the attribute `name` is called in the class around `node`."""
        classes = [parent.name.lstrip("_") for parent, *_ in self.path if isinstance(parent, ast.ClassDef)]
        private = name.startswith("__") and not name.endswith("__")
        return f"_{classes[-1]}{name}" if private and classes and classes[-1] else name


def find(function: types.FunctionType) -> Definition | None:
    """The definition of `function`; None where no source at hand compiles to it, or it has decorators."""
    code = function.__code__
    for source in _sources(function):
        read = _read(source, code.co_filename)
        if read is None:
            continue
        tree, codes = read
        path = _path(tree, code.co_name, code.co_firstlineno)
        if path and _same(_pick(codes, code), code):
            parent, field, index = path[-1]
            return Definition(getattr(parent, field)[index], code.co_filename, path)
    return None


def recompile(function: types.FunctionType, found: Definition, node: ast.FunctionDef) -> types.FunctionType | None:
    """`function` with `node` in place of its definition; None where its free variables would be others."""
    replaced: ast.AST = node
    for parent, field, index in reversed(found.path):
        children = [*getattr(parent, field)]
        children[index] = replaced
        replaced = copy.copy(parent)
        setattr(replaced, field, children)
    code = _pick(_compiled(replaced, found.filename), function.__code__)
    if code is None or code.co_freevars != function.__code__.co_freevars:
        return None
    made = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    for name in functools.WRAPPER_ASSIGNMENTS:
        if hasattr(function, name):
            setattr(made, name, getattr(function, name))
    made.__dict__.update(function.__dict__)
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
def _read(source: str, filename: str) -> tuple[ast.Module, tuple[types.CodeType, ...]] | None:
    """The tree of a module and its code objects; None where it is not Python."""
    try:
        with _quiet():
            tree = ast.parse(source)
        return tree, _compiled(tree, filename)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _compiled(module: ast.Module, filename: str) -> tuple[types.CodeType, ...]:
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


def _path(node: ast.AST, name: str, line: int) -> tuple[tuple[ast.AST, str, int], ...]:
    """The way from `node` to the ``def`` of `name` in `line`; empty where there is none."""
    for field, value in ast.iter_fields(node):
        for index, child in enumerate(value if isinstance(value, list) else ()):
            first, last = getattr(child, "lineno", line), getattr(child, "end_lineno", line)
            if not isinstance(child, ast.AST) or not first <= line <= last:
                continue
            if isinstance(child, ast.FunctionDef) and child.name == name and child.lineno == line:
                return ((node, field, index),)
            if below := _path(child, name, line):
                return ((node, field, index), *below)
    return ()
