"""What the 1x1 ops share: values that are applied on load, and matrix products over pixels.

A lazy activation and a lazy gradient (design: `steps.lazy`) are a raw tensor and per-channel vectors::

    x^ = x                                            x_scale, x_shift absent
       | relu(x_scale[c]*x + x_shift[c])              given
    g' = keep * g;  keep = bit of `mask`              mask given (uint8, see `norm_add_relu`)
                         | not (scale*z + shift <= 0) scale and shift given
                         | 1
    dz = f*a[k]*g' + b[k]*z + d[k]                    absent: f (sample_factor[n]) and a are 1, b and d are 0

Both are computed in float32 (float64 for float64) and then rounded once to the dtype of the activations, as if they had
been written and read again: a kernel that multiplies matrices of that dtype loses nothing against stock. Products are
accumulated in float32.
"""

from __future__ import annotations

import torch

from .contract import Tensor, keep_from, nbytes, per_channel, per_sample, stat_dtype

#: Of a lazy gradient's arguments, and of what is added to the gradient of an input: see :attr:`.contract.Op.forms`.
GRADIENT_FORMS = "g,z:~K mask:!K a,b,d,scale,shift:K sample_factor:N"
ADDED_FORMS = "residual:~C>residual_stride residual_mask:!C>residual_stride coupling:CxC constant:C"


def activation(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``x^``, rounded to the dtype of `x`."""
    if scale is None:
        return x
    return torch.relu(x.to(scale.dtype) * per_channel(scale) + per_channel(shift)).to(x.dtype)


def gradient(
    g: Tensor,
    mask: Tensor | None = None,
    z: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    d: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sample_factor: Tensor | None = None,
) -> Tensor:
    """``dz``, rounded to the dtype of `g`."""
    dtype = stat_dtype(g.dtype)
    dz = g.to(dtype)
    keep = None
    if mask is not None:
        keep = keep_from(mask, g)
    elif scale is not None:
        keep = ~(z.to(dtype) * per_channel(scale) + per_channel(shift) <= 0)
    if keep is not None:
        dz = torch.where(keep, dz, torch.zeros_like(dz))
    if sample_factor is not None:
        dz = dz * per_sample(sample_factor)
    if a is not None:
        dz = dz * per_channel(a)
    if b is not None:
        dz = dz + (per_channel(b) * z.to(dtype) + per_channel(d))
    return dz.to(g.dtype)


def settled(z: Tensor, b: Tensor) -> Tensor:
    """`z`, and zeros where b is: so that ``b*z`` hands on no NaN or infinity where a norm is frozen."""
    return torch.where(per_channel(b) == 0, torch.zeros_like(z), z)


def gradient_bytes(g, mask=None, z=None, b=None, scale=None) -> int:
    """What a read of ``dz`` reads: `g`, its bits, and `z` where a term needs it."""
    return nbytes(g, mask, z if b is not None or (scale is not None and mask is None) else None)


def pixels(x: Tensor, stride=(1, 1)) -> Tensor:
    """The pixels that a 1x1 convolution of this stride reads."""
    return x[:, :, :: stride[0], :: stride[1]]


def strided_shape(x: Tensor, channels: int, stride) -> tuple[int, int, int, int]:
    """Shape of a 1x1 convolution's result."""
    n, _, h, w = x.shape
    return n, channels, -(-h // stride[0]), -(-w // stride[1])


def matrix(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N*H*W, C]``, in the dtype of accumulation (float64 on the CPU, where it is free)."""
    wide = torch.float64 if x.device.type == "cpu" else stat_dtype(x.dtype)
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).to(wide)


def image(rows: Tensor, shape) -> Tensor:
    """Inverse of :func:`matrix`, in the dtype of `rows`."""
    n, c, h, w = shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x W'`` for ``[N, C, H, W]`` and ``[K, C, 1, 1]``, in the dtype of statistics."""
    out = (matrix(x) @ matrix(weight).T).to(stat_dtype(x.dtype))
    return image(out, (x.shape[0], weight.shape[0], *x.shape[2:]))
