"""Launches of a compiled kernel without Triton's own look-up, which takes longer than all else of a launch.

``JITFunction.run`` finds the binary anew at every launch, by the types of all arguments, by which integers are 1 or
multiples of 16, by which pointers are, and by options. A plan (:mod:`.plans`) is of calls that are alike in all of
these on one device: what the first launch ran, the others run too, with the same integers and constants. They are
handed to the launcher that Triton built for that binary, as ``JITFunction.run`` does it in Triton 3.6, 3.8 and 3.9
(read; it has not run on hardware)::

    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, metadata, enter, exit, *arguments)

Where a profiler listens (launch hooks, hooks on the kernel, hooks into the compiler) each launch goes through
``JITFunction.run``. Settings that it reads from the environment, such as TRITON_DEBUG, count at the first launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

_runtime = triton.knobs.runtime
#: What Triton and its launcher must have; a version that differs goes through ``JITFunction.run``.
_NEEDED = ("run", "function", "packed_metadata", "metadata")


def _hooks(chain: object) -> bool:
    """Whether anybody listens; a chain that says it otherwise than by `calls` counts as listened to."""
    return chain is not None and bool(getattr(chain, "calls", True))


def watched(kernel: object) -> bool:
    """Whether somebody wants to see this kernel's launches, or changes how it is compiled."""
    hooks = _hooks(_runtime.launch_enter_hook) or _hooks(_runtime.launch_exit_hook)
    return hooks or _runtime.add_stages_inspection_hook is not None or bool(kernel.pre_run_hooks)


class Bound:
    """One launch of a plan: after :meth:`keep` has seen what it ran, :meth:`start` repeats it on other tensors."""

    def __init__(self, kernel: object) -> None:
        self.kernel, self.compiled, self.rest = kernel, None, ()

    def keep(self, compiled: object, given: int, meta: dict) -> None:
        """Remember what ``kernel[grid](...)`` returned for `given` positional arguments and those of `meta`."""
        names = self.kernel.arg_names[given:]
        if all(hasattr(compiled, name) for name in _NEEDED) and set(names) == set(meta):
            self.rest = tuple(meta[name] for name in names)
            self.compiled = compiled

    def start(self, programs: int, device: torch.device, arguments: tuple) -> bool:
        """Launch it on the current stream of `device`, the current one; False: it is not for this class to do."""
        compiled = self.compiled
        if compiled is None or watched(self.kernel):
            return False
        self._launch(compiled, programs, _stream(device.index), arguments)
        return True

    def _launch(self, compiled: object, programs: int, stream: int, arguments: tuple) -> None:
        what = compiled.function, compiled.packed_metadata, None, None, None
        compiled.run(programs, 1, 1, stream, *what, *arguments, *self.rest)


_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None)
