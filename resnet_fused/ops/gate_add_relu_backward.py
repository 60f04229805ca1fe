"""First half of the backward of `gate_add_relu`: mask the gradient, sum what the factor's gradient is made of.

Formula::

    g            = not (out <= 0) ? grad_out : 0     (a select, NaN vanishes too; `out` absent: grad_out)
    sum_gz[n, c] = sum over the pixels of a sample of g * z      the gradient of the factor

`grad_out`, `z` and `out`, the forward's output: ``[N, C, H, W]``, one dtype, channels_last. `g`: like grad_out, the
gradient of the residual; `sum_gz`: ``[N, C]`` float32 (float64 for float64). The gradient of z is ``factor*g`` and
what comes back through the factor: `gate_add_relu` again, once that is known.
"""

from __future__ import annotations

import torch

from .contract import Tensor, channels_last, channels_last_like, define, nbytes, stat_dtype, two_launches

SCHEMA = "(Tensor grad_out, Tensor z, Tensor? out=None) -> (Tensor g, Tensor sum_gz)"
FORMS = "grad_out,z,out:~C"


def reference(grad_out: Tensor, z: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    dtype = stat_dtype(grad_out.dtype)
    g = grad_out if out is None else torch.where(out <= 0, torch.zeros_like(grad_out), grad_out)
    wide = torch.float64 if g.device.type == "cpu" else dtype  # float64 sums where they are free
    return channels_last(g.clone()), (g.to(wide) * z.to(wide)).sum((2, 3)).to(dtype)


def fake(grad_out: Tensor, z: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return channels_last_like(grad_out), grad_out.new_empty(grad_out.shape[:2], dtype=stat_dtype(grad_out.dtype))


def bytes(grad_out, z, out=None):
    """One read of everything given, one write of `g`."""
    return 2 * nbytes(grad_out) + nbytes(z, out)


def flops(grad_out, z, out=None):
    """A multiply-add."""
    return 2 * grad_out.numel()


OP = define(
    "gate_add_relu_backward",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    compiled=True,
    forms=FORMS,
    launches=two_launches,
)
