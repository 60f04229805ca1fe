"""Batch norm of one tensor as a multiply-add, from its batch statistics: the per-channel arithmetic of its forward.

Formula (all per channel; M = pixels of z; `mean`, `m2`: of :mod:`.bn_stats` or of a convolution that emits them)::

    var    = m2/M                    M = 0: 0
    rstd   = 1/sqrt(var + eps)
    scale  = gamma*rstd              gamma absent: 1
    shift  = beta - mean*scale       beta absent: 0
    centre = E relu(N(beta, gamma^2)) = beta*Phi(t) + |gamma|*phi(t),  t = beta/|gamma|;  0 where that is not finite

so that batch norm is ``scale*z + shift``. `centre`, the mean of ``relu(scale*z + shift)`` if z were normal, is what a
Gram matrix of that activation is shifted by (:mod:`.gram`): any finite value is correct there, and NaN has to come from
the data alone.

Ops that take statistics take gamma, beta and eps too, and with eps return these five in the place of m2
(:func:`after`): a GPU starts one kernel less.

`mean`, `m2` and all results: ``[C]``, float32 (float64 by the reference). `gamma`, `beta`: ``[C]``, any floating dtype.
`z`: ``[N, C', H, W]``; only N, H and W are read (a number of pixels as an argument of the op would be a symbolic
integer, which Dynamo cannot pass).
"""

from __future__ import annotations

import math

import torch

from .contract import Tensor, define, nbytes

SCHEMA = (
    "(Tensor mean, Tensor m2, Tensor? gamma, Tensor? beta, Tensor z, float eps) -> "
    "(Tensor var, Tensor rstd, Tensor scale, Tensor shift, Tensor centre)"
)
FORMS = "mean,m2,gamma,beta:C z:~Z"
#: Of an op that takes statistics: its last arguments and its last results.
PARAMETERS = "Tensor? gamma=None, Tensor? beta=None, float? eps=None"
RESULTS = "Tensor mean, Tensor m2, Tensor var, Tensor rstd, Tensor scale, Tensor shift, Tensor centre"

Vectors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def reference(mean: Tensor, m2: Tensor, gamma: Tensor | None, beta: Tensor | None, z: Tensor, eps: float) -> Vectors:
    count = z.shape[0] * z.shape[2] * z.shape[3]
    var = m2 / count if count else torch.zeros_like(m2)
    rstd = (var + eps).rsqrt()
    scale = rstd.clone() if gamma is None else gamma.to(rstd.dtype) * rstd
    shift = -mean * scale if beta is None else torch.addcmul(beta.to(rstd.dtype), mean, scale, value=-1)
    return var, rstd, scale, shift, _relu_mean(mean, gamma, beta)


def _relu_mean(like: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    sigma = torch.ones_like(like) if gamma is None else gamma.detach().to(like.dtype).abs()
    mu = torch.zeros_like(like) if beta is None else beta.detach().to(like.dtype)
    t = mu / sigma.clamp_min(1e-12)
    density = torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
    centre = mu * 0.5 * (1 + torch.erf(t / math.sqrt(2))) + sigma * density
    return torch.nan_to_num(centre, 0.0, 0.0, 0.0)


def fake(mean: Tensor, m2: Tensor, gamma: Tensor | None, beta: Tensor | None, z: Tensor, eps: float) -> Vectors:
    return tuple(mean.new_empty(mean.shape) for _ in range(5))


def after(
    mean: Tensor, m2: Tensor, gamma: Tensor | None, beta: Tensor | None, z: Tensor, eps: float | None
) -> tuple[Tensor, ...]:
    """:data:`RESULTS` of an op that found `mean` and `m2`: with `eps` the five results of this op, and m2 empty."""
    none = mean.new_empty(0)
    if eps is None or not mean.numel():
        return mean, m2, *(none.clone() for _ in range(5))
    return mean, none, *reference(mean, m2, gamma, beta, z, eps)


def fake_after(mean: Tensor, eps: float | None) -> tuple[Tensor, ...]:
    """:data:`RESULTS` in the form of `mean`."""
    c, affine = mean.shape[0], eps is not None
    return mean, mean.new_empty(0 if affine else c), *(mean.new_empty(c if affine else 0) for _ in range(5))


def bytes(mean, m2, gamma, beta, z, eps):
    """One read of the vectors, one write of five."""
    return nbytes(mean, m2, gamma, beta) + 5 * nbytes(mean)


def flops(mean, m2, gamma, beta, z, eps):
    """About twenty a channel, an exponential, an error function, a root and two divisions being one each."""
    return 20 * mean.numel()


OP = define(
    "bn_affine",
    SCHEMA,
    reference=reference,
    fake=fake,
    bytes=bytes,
    flops=flops,
    small=True,
    compiled=True,
    vectors=True,
    forms=FORMS,
)
