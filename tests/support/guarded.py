"""Tensors that a kernel's C function takes, and outputs with guards around them."""

from __future__ import annotations

import ctypes

import torch

#: As the C functions of tests/cuda_on_cpu number them.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Guarded:
    """An output of `shape` in channels_last order between guard values, filled with NaN or ones so that gaps show."""

    PAD = 64

    def __init__(self, shape, dtype):
        self.shape, count = shape, torch.Size(shape).numel()
        self.sentinel = 171 if dtype == torch.uint8 else -12345.0
        self.store = torch.full((count + 2 * self.PAD,), self.sentinel, dtype=dtype)
        self.inner = self.store[self.PAD : self.PAD + count]
        self.inner.fill_(255 if dtype == torch.uint8 else float("nan"))

    def pointer(self):
        return ctypes.c_void_p(self.inner.data_ptr())

    def value(self) -> torch.Tensor:
        guard = torch.full((self.PAD,), self.sentinel, dtype=self.store.dtype)
        assert torch.equal(self.store[: self.PAD], guard), "wrote before the buffer"
        assert torch.equal(self.store[-self.PAD :], guard), "wrote behind the buffer"
        if len(self.shape) != 4:
            return self.inner.view(self.shape)
        n, c, h, w = self.shape
        return self.inner.view(n, h, w, c).permute(0, 3, 1, 2)


def activation(shape, dtype, generator, offset: int = 0) -> torch.Tensor:
    """Random channels_last data; `offset` elements off alignment, which forbids 16-byte loads."""
    n, c, h, w = shape
    flat = torch.randn(n * h * w * c + offset, generator=generator).to(dtype)
    return flat[offset:].view(n, h, w, c).permute(0, 3, 1, 2)


def pointer(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def tf32(t):
    """A float32 tensor rounded to TF32 as for tensor cores: to nearest, ties away from zero; NaN and infinity stay."""
    held = (t.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
    return torch.where(t.isfinite(), held, t)
