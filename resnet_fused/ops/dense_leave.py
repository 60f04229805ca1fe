"""The gradient of a dense block's input, from what has gathered at the start of the block's buffer.

Formula::

    grad_x = grad + (b[c]*x + d[c])        the norms of all layers, whose terms in x are in b and d;
                                           no term b[c]*x where b[c] = 0

`grad`, `x`: ``[N, C, H, W]``, one dtype, channels_last or slices (:func:`.contract.is_slice`): float32 (float64,
bfloat16 and float16 by the reference); `b`, `d`: ``[C]``, in the dtype of statistics, in which the terms are added
before they are rounded. `grad_x`: like grad, channels_last.
"""

from __future__ import annotations

from . import lazy
from .contract import Tensor, channels_last, channels_last_like, define, nbytes

SCHEMA = "(Tensor grad, Tensor x, Tensor b, Tensor d) -> Tensor grad_x"
FORMS = "grad,x:~C b,d:C"


def reference(grad: Tensor, x: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return channels_last(lazy.gradient(grad, z=lazy.settled(x, b), b=b, d=d))


def fake(grad: Tensor, x: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return channels_last_like(grad)


def bytes(grad: Tensor, x: Tensor, b: Tensor, d: Tensor) -> int:
    """One read of `grad` and `x`, one write of `grad_x`."""
    return nbytes(grad, x, grad)


def flops(grad: Tensor, x: Tensor, b: Tensor, d: Tensor) -> int:
    return 3 * grad.numel()


OP = define("dense_leave", SCHEMA, reference=reference, fake=fake, bytes=bytes, flops=flops, compiled=True, forms=FORMS)
