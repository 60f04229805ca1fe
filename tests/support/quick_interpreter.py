"""Triton's interpreter without what it does over and over.

What a kernel computes stays Triton's: its operations, their order and their checks. Triton alone, however, puts the
interpreted operations in the language's place for each launch, and again at each call of a device function, and that
took most of a suite's time. Half of what was left went into sums that tell whether integers overflow, of which nothing
becomes without Triton's option `debug`.
"""

import dataclasses
import functools

from triton import language as tl
from triton.language import core
from triton.runtime import interpreter

MOST_TYPES = 4096  # kept: each launch brings pointers of its own


def install() -> None:
    """For all kernels of this process, which interprets to its end."""
    interpreter._patch_lang = functools.partial(_patch_once, interpreter._patch_lang, set())
    interpreter._get_np_dtype = functools.partial(_numpy_dtype, interpreter._get_np_dtype, {})
    core.block_type.__init__ = _block_types(core.block_type.__init__)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def _patch_once(patch, patched, fn):
    """Let `patch` replace the operations of the modules that `fn` sees, unless it did. What it replaced stays."""
    seen = _modules(fn)
    if seen not in patched:
        patch(fn)
        patched.add(seen)
    return interpreter._LangPatchScope()  # in which nothing is to be restored


@functools.cache
def _modules(fn):
    return frozenset(value for value in fn.__globals__.values() if value is tl or value is tl.core)


def _block_types(make):
    """What `make` makes of a block's type, which each operation makes anew, in words and all, made once."""
    known = {}

    @functools.wraps(make)
    def __init__(self, element_ty, shape):
        key = id(element_ty), *(size if type(size) is int else getattr(size, "value", size) for size in shape)
        if key not in known:
            if len(known) >= MOST_TYPES:
                known.clear()
            make(self, element_ty, shape)
            known[key] = dict(self.__dict__)  # the element's type among it, so that nothing else comes to have its id
        else:
            self.__dict__.update(known[key])

    return __init__


def _numpy_dtype(find, known, dtype):
    """What `find` says of `dtype`, of which it makes a table each time."""
    if dtype.name not in known:
        known[dtype.name] = find(dtype)
    return known[dtype.name]
