"""What a backend says about itself; dispatch, error texts, tests, `info` and the README's table all read this."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..ops import OPS


def no_reasons(*args, **kwargs) -> list[str]:
    """The default of :attr:`Kernel.unsupported`: nothing stands against any case."""
    return []


def no_more_cases(dtype: torch.dtype) -> tuple:
    """The default of :attr:`Kernel.more_cases`."""
    return ()


def no_mode(dtype: torch.dtype) -> None:
    """The default of :attr:`Kernel.mode`."""


def no_shorter_way(args: tuple, kwargs: dict) -> None:
    """The default of :attr:`Kernel.prepare`."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One op on one backend."""

    run: Callable  # the op's arguments -> its results
    dtypes: tuple[torch.dtype, ...]  # of the activations
    unsupported: Callable = no_reasons  # the op's arguments -> reasons against this case, beyond device and dtype
    #: Of what `unsupported` says, what a plan can ask for before there is a call; of a 1x1 op: numbers of output and
    #: input channels, and whether the inputs are coupled -> reasons.
    widths: Callable = no_reasons
    needs_selfcheck: bool = False  # compare with the reference on first use on a device architecture
    more_cases: Callable = no_more_cases  # dtype of the activations -> what it is judged by beside the op's own cases
    build: str = ""  # identity of the code that runs, e.g. a hash; without it a verdict is not kept beyond the process
    #: ``(args, kwargs, card) -> launches``, see :mod:`.triton.trace`: for a kernel that comes in many binaries, each of
    #: which is judged by itself. None: one verdict for all cases.
    launches: Callable | None = None
    mode: Callable = no_mode  # dtype of the activations -> what else than a call's arguments decides its binaries
    #: ``(args, kwargs) -> call``, which runs all calls of the same form (:mod:`.met`) on their arguments in one tuple,
    #: those by name last, in fewer steps than `run`, and writes itself into graphs (:class:`.triton.plans.Plan`). None
    #: where it knows of none.
    prepare: Callable = no_shorter_way


@dataclasses.dataclass
class Backend:
    """A named set of kernels for some device types."""

    name: str
    devices: tuple[str, ...]
    kernels: dict[str, Kernel]
    unavailable: str = ""  # why no kernel of this backend can run on this machine; empty: they can

    def reasons(self, op: str, args: tuple, kwargs: dict) -> list[str]:
        """Why this backend cannot run `op` on these arguments; empty if it can. Never raises."""
        if self.unavailable:
            return [self.unavailable]
        kernel = self.kernels.get(op)
        if kernel is None:
            return [f"has no {op}"]
        x = args[0]
        if x.device.type not in self.devices:
            return [f"runs on {'/'.join(self.devices)}, not on {x.device.type}"]
        if x.dtype not in kernel.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in kernel.dtypes)
            return [f"takes {names}, not {str(x.dtype).removeprefix('torch.')}"]
        return kernel.unsupported(*args, **kwargs)


def check_complete(backend: Backend) -> Backend:
    """Refuse a backend that declares an op nobody defined: a typing error, found at import."""
    unknown = sorted(set(backend.kernels) - set(OPS))
    if unknown:
        raise ValueError(f"backend {backend.name} declares unknown ops {unknown}; known are {sorted(OPS)}")
    return backend
