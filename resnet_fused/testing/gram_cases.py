"""Cases of the Gram join's small matrices: Gram matrices and products of real data, so that they fit each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case, Draw
from ..backends.selfcheck.lazy_cases import GramJoin

Tensor = torch.Tensor

#: name -> shape of a, output channels
SHAPES = {
    "one channel, one output": ((3, 1, 4, 5), 1),
    "3 channels": ((2, 3, 5, 7), 65),
    "65 channels, 3 outputs": ((2, 65, 3, 5), 3),
    "one value": ((1, 1, 1, 1), 1),
    "one pixel": ((1, 40, 1, 1), 24),
    "one pixel a sample": ((5, 24, 1, 1), 17),
    "ambiguous strides": ((2, 8, 8, 1), 8),
    "many rows of W": ((2, 24, 9, 9), 130),  # several programs in every backend, the last one short
    "many channels": ((3, 200, 6, 7), 70),  # several tiles, fewer pixels than channels: a singular covariance
    "even number of tiles": ((2, 128, 11, 12), 64),
    "empty batch": ((0, 8, 3, 3), 24),
}


class NormalJoin(GramJoin):
    """As `GramJoin`, of normal deviates, with weights of a size that preserves theirs."""

    def __init__(self, shape, *arguments):
        super().__init__(shape, *arguments)
        self.weight = self.weight * (16 / shape[1] ** 0.5)

    def data(self, shape=None) -> Tensor:
        values = torch.randn(shape or self.shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return values.contiguous(memory_format=torch.channels_last)


def _joins(dtype: torch.dtype) -> Iterator[tuple[str, GramJoin]]:
    for name, (shape, outputs) in SHAPES.items():
        yield name, NormalJoin(shape, outputs)
    shape = (2, 24, 20, 20)
    far = Draw(shape).far_from_zero(dtype)
    yield "large mean, centre near it", NormalJoin(shape, 33, far, far[0, :, 0, 0].clone())
    yield "input of a relu, centre zero", NormalJoin(shape, 33, NormalJoin(shape, 33).data().relu(), torch.zeros(24))
    yield (
        "constant input",
        NormalJoin(shape, 33, torch.full(shape, 0.375).contiguous(memory_format=torch.channels_last)),
    )


def gram_norm(dtype: torch.dtype) -> Iterator[Case]:
    for name, join in _joins(dtype):
        yield Case(name, join.norm(), {})
    for name, (shape, outputs) in SHAPES.items():
        join = NormalJoin(shape, outputs)
        parameters = {"gamma": join.vector(outputs), "beta": join.vector(outputs), "eps": 1e-3}
        yield Case(f"{name}, batch norm", join.norm(), parameters)
        yield Case(f"{name}, batch norm without parameters", join.norm(), {"eps": 1e-3})
    join = NormalJoin((2, 24, 5, 7), 65)
    weight, gram, total, centre, a = join.norm()
    yield Case("some variances below zero", (weight, gram - gram.flip(0, 1), total * 0, centre, a), {})
    gram = gram.clone()
    gram[3, 5] = torch.nan
    yield Case("NaN in gram", (weight, gram, total, centre, a), {})
    weight, gram, total, *rest = join.norm()
    total = total.clone()
    total[2] = torch.nan
    yield Case("NaN in total", (weight, gram, total, *rest), {})
    weight, *rest = join.norm()
    weight[7, 1] = torch.nan
    yield Case("NaN in weight", (weight, *rest), {})


def gram_grad(dtype: torch.dtype) -> Iterator[Case]:
    for name, join in _joins(dtype):
        weight, product, *rest = join.grad()
        if join.a.numel() and (join.a == join.a[:1, :, :1, :1]).all():  # gamma's gradient would be 0 but for rounding
            product = product + join.data((*product.shape, 1, 1)).flatten(1)
        yield Case(name, (weight, product, *rest), {})
    weight, product, *rest = NormalJoin((2, 24, 5, 7), 65).grad()
    product[7, 1] = torch.nan
    yield Case("NaN in product", (weight, product, *rest), {})
    weight, product, gram, *rest = NormalJoin((2, 24, 5, 7), 65).grad()
    gram[3, 5] = torch.nan
    yield Case("NaN in gram", (weight, product, gram, *rest), {})


CASES = {"gram_norm": gram_norm, "gram_grad": gram_grad}
