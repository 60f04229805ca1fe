"""Cases of the ops that average over windows, and what they are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...ops.norm_relu_avg_pool import pooled_shape
from .draws import ODD, TAIL, Case, Draw

Tensor = torch.Tensor


class AverageDraw(Draw):
    """What the ops are given. All values are eighths and sixteenths, so that signs are the same in every arithmetic."""

    def __init__(self, shape, kernel=(2, 2), stride=(2, 2)):
        super().__init__(shape)
        self.window = (list(kernel), list(stride))

    def forward(self, x: Tensor | None = None) -> tuple:
        """Arguments of `norm_relu_avg_pool`."""
        return (self.data() if x is None else x, self.vector(), self.vector(), *self.window)

    def _gradient(self, nan_where_masked: bool) -> tuple[tuple, Tensor, Tensor]:
        """What the forward was given, a gradient at what it gave, and a vector.

        `nan_where_masked`: all windows of one channel, whose values are negative; the gradient there is NaN.
        """
        x, scale, shift, *window = self.forward()
        grad_out = self.data(pooled_shape(x, *self.window))
        if nan_where_masked:
            x[:, 0], scale[0], shift[0], grad_out[:, 0] = -1.0, 1.0, 0.0, torch.nan
        return (x, scale, shift, *window), grad_out, self.vector()

    def backward(self, nan_where_masked: bool = False) -> tuple:
        """Arguments of `norm_relu_avg_pool_backward`."""
        (x, *rest), grad_out, mean = self._gradient(nan_where_masked)
        return grad_out, x, mean, *rest

    def apply(self, affine: bool = True, nan_where_masked: bool = False) -> tuple:
        """Arguments of `norm_relu_avg_pool_apply`."""
        (x, *rest), grad_out, a = self._gradient(nan_where_masked)
        b, d = (self.vector(), self.vector()) if affine else (None, None)
        return grad_out, x, a, b, d, *rest


def norm_relu_avg_pool(dtype: torch.dtype) -> Iterator[Case]:
    odd = AverageDraw(ODD)
    x = odd.data()
    x[0, 0, 1:3, 1] = torch.nan
    yield Case("NaN, odd channels", odd.forward(x), {})
    yield Case("3x3, stride 1", AverageDraw(TAIL, (3, 3), (1, 1)).forward(), {})
    yield Case("tail rows", AverageDraw(TAIL).forward(), {})


def norm_relu_avg_pool_backward(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("NaN where masked, odd channels", AverageDraw(ODD).backward(nan_where_masked=True), {})
    yield Case("nine windows a pixel", AverageDraw(TAIL, (3, 3), (1, 1)).backward(), {})
    yield Case("tail rows", AverageDraw(TAIL).backward(), {})


def norm_relu_avg_pool_apply(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("frozen, odd channels", AverageDraw(ODD).apply(affine=False), {})
    yield Case("nine windows a pixel", AverageDraw(TAIL, (3, 3), (1, 1)).apply(), {})
    yield Case("NaN where masked, tail rows", AverageDraw(TAIL).apply(nan_where_masked=True), {})
