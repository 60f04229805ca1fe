"""Values that are not tensors yet: a normalised activation, and the gradient before a batch norm, or on its way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import run
from ..ops import stat_dtype
from .batch_norm import Affine, Coefficients

Pixels = tuple[int, int]
EVERY: Pixels = (1, 1)


class Lazy(NamedTuple):
    """``relu(scale*z + shift)``: an activation known by the raw convolution output it came from."""

    z: Tensor  # [N, C, H, W]
    bn: Affine
    written: Tensor | None = None  # the activation, where it was kept

    def materialise(self, backend: str) -> Tensor:
        """Write the activation down, for a consumer that cannot apply it on load."""
        if self.written is not None:
            return self.written
        return run("norm_add_relu", self.z, self.bn.scale, self.bn.shift, backend=backend)[0]


def as_it_is(a: Tensor) -> Lazy:
    """An activation as a value of no norm: ``relu(1*a + 0)``."""
    ones = torch.ones(a.shape[1], dtype=stat_dtype(a.dtype), device=a.device)
    zeros = torch.zeros_like(ones)
    return Lazy(a, Affine(zeros, None, ones, zeros))


class Gram(NamedTuple):
    """Sufficient statistics of the input `a` of a 1x1 convolution, shifted by `centre`."""

    gram: Tensor  # [C, C]
    total: Tensor  # [C]
    centre: Tensor  # [C]


class Folded(NamedTuple):
    """A branch of a join whose output is never written."""

    bn: Affine
    gram: Gram | None  # None: running statistics


class LazyGrad(NamedTuple):
    """``a*f*keep*g + b*z + d``: a gradient known by the one behind batch norm (and ReLU, if `relu`)."""

    g: Tensor  # [N, C, H, W]
    z: Tensor | None  # [N, C, H, W]
    coefficients: Coefficients
    bn: Affine
    relu: bool = False  # whether g is still to be masked by the sign of scale*z + shift
    sample_factor: Tensor | None = None  # [N]
    mask: Tensor | None = None  # bits by which g is still to be masked, see `norm_add_relu`

    def on_load(self) -> dict[str, Tensor | None]:
        """The arguments by which a 1x1 op applies this on load, see ``ops.lazy``."""
        c = self.coefficients
        scale, shift = (self.bn.scale, self.bn.shift) if self.relu else (None, None)
        z = self.z if self.relu or c.b is not None else None
        vectors = {"a": c.a, "b": c.b, "d": c.d, "scale": scale, "shift": shift}
        return {"mask": self.mask, "z": z, "sample_factor": self.sample_factor} | vectors

    def materialise(self, backend: str, into_g: bool = False, residual: Tensor | None = None) -> Tensor:
        """Write the gradient down, for a consumer that cannot apply it on load; over `g` where the caller owns that.

        Args:
            residual: added to it, ``[N, C, H, W]``; in memory of its own where `g` is written over.
        """
        options = self.on_load() | {"residual": residual}
        if into_g and self.g.device.type == "cpu" and backend != "triton":  # whose interpreter has no such op
            run("lazy_grad_apply_", self.g, **options, backend=backend)
            return self.g
        return run("lazy_grad_apply", self.g, **options, backend=backend)


Value = Tensor | Lazy


class Pending(NamedTuple):
    """The gradient of a value, as far as its readers have been passed."""

    grad: Tensor | LazyGrad
    owned: bool = True  # whether it may be written to
    pixels: Pixels = EVERY  # the stride of those that it is of; all others' is 0
    mask: Tensor | None = None  # bits by which it is still to be masked
    correction: tuple[Tensor, Tensor] | None = None  # of a Gram join, still to be added: coupling and constant
