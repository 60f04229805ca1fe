"""Batch norm's backward from the gradient behind its ReLU: the sums over the batch, and the multiply-add they make.

Formula (all per channel; M = pixels of z; f = sample_factor[n], absent: 1)::

    g       = keep ? grad : 0,  keep = not (scale*z + shift <= 0)       mask absent
                                     | bit of mask, or not (mask <= 0)  see `norm_add_relu_backward`
    sum_g   = sum_m f*g;   sum_gz = sum_m f*g*(z - mean)
    b, d, grad_gamma = bn_coefficients(sum_g, sum_gz, mean, rstd, scale, z)

so that the gradient at batch norm's input is ``f*scale*g + b*z + d``. It is :mod:`.norm_add_relu_backward` without a
gradient to write, and :mod:`.bn_coefficients` behind it; on a GPU in one kernel less.

`grad`, `z`: ``[N, C, H, W]``, one dtype, channels_last; vectors ``[C]`` float32 (float64 for float64), `shift` only
without `mask`; `sample_factor`: ``[N]``.
"""

from __future__ import annotations

from . import bn_coefficients, norm_add_relu_backward
from .contract import Tensor, define, nbytes, stat_dtype, takes_arguments_of, two_launches

SCHEMA = (
    "(Tensor grad, Tensor z, Tensor mean, Tensor rstd, Tensor scale, Tensor? shift=None, Tensor? mask=None, "
    "Tensor? sample_factor=None) -> (Tensor sum_g, Tensor b, Tensor d, Tensor grad_gamma)"
)
FORMS = "grad,z:~C mean,rstd,scale,shift:C mask:!C sample_factor:N"


def in_two(sums, coefficients):
    """The op made of one that sums, as `norm_add_relu_backward` does, and one like `bn_coefficients`."""

    def run(
        grad: Tensor,
        z: Tensor,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        shift: Tensor | None = None,
        mask: Tensor | None = None,
        sample_factor: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sign = {"scale": scale, "shift": shift} if mask is None else {"mask": mask}
        options = {"z": z, "mean": mean, "sample_factor": sample_factor, "emit_grad": False}
        _, sum_g, sum_gz, *_ = sums(grad, **options, **sign)
        return sum_g, *coefficients(sum_g, sum_gz, mean, rstd, scale, z)

    return run


reference = in_two(norm_add_relu_backward.reference, bn_coefficients.reference)


@takes_arguments_of(reference)
def fake(t):
    vector = t.grad.new_empty(t.grad.shape[1], dtype=stat_dtype(t.grad.dtype))
    return vector, *(vector.new_empty(vector.shape) for _ in range(3))


@takes_arguments_of(reference)
def bytes(t):
    """One read of everything given but the vectors."""
    return nbytes(t.grad, t.z, t.mask)


@takes_arguments_of(reference)
def flops(t):
    """As of `norm_add_relu_backward`."""
    return t.grad.numel() * (4 if t.mask is not None else 6)


OP = define(
    "norm_relu_coefficients",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    forms=FORMS,
    launches=two_launches,
)
