"""Cases of batch norm's per-channel arithmetic: vectors of the sizes that networks and their edges have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case
from ..ops.contract import channels_last_strides

Tensor = torch.Tensor

CHANNELS = (1, 3, 65, 128, 2048)
PIXELS = {"no pixels": (0, 8, 3, 3), "one pixel": (1, 8, 1, 1), "many pixels": (4, 3, 31, 29)}
SPECIALS = (torch.nan, torch.inf, -torch.inf, -0.0)


class Vectors:
    """Normal deviates, from a generator of their own."""

    def __init__(self, channels: int):
        self.channels = channels
        self.generator = torch.Generator("cpu").manual_seed(0)

    def vector(self) -> Tensor:
        return torch.randn(self.channels, generator=self.generator, dtype=torch.float64, device="cpu")

    def statistics(self, pixels: int) -> tuple[Tensor, Tensor]:
        """Mean and second moment of so many pixels, with one constant channel."""
        m2 = self.vector().exp() * pixels
        m2[0] = 0
        return self.vector() + 1, m2

    def parameters(self) -> tuple[Tensor, Tensor]:
        """gamma and beta: of both signs, and where there are more than two channels a zero in each and in both."""
        gamma, beta = self.vector(), self.vector()
        gamma[1:3] = beta[2:4] = 0
        return gamma, beta

    def sums(self) -> tuple[Tensor, ...]:
        """sum_g, sum_gz, mean, rstd, scale."""
        rstd = self.vector().exp()
        return self.vector() * 9, self.vector() * 9, self.vector() + 1, rstd, self.vector() * rstd


def _images(shape) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64).as_strided(shape, channels_last_strides(shape))


def _special(t: Tensor, first: int) -> Tensor:
    """NaN, infinities and -0.0 in the channels from `first` on."""
    t = t.clone()
    t[first : first + len(SPECIALS)] = torch.tensor(SPECIALS, dtype=t.dtype)
    return t


def bn_affine(dtype: torch.dtype) -> Iterator[Case]:
    for channels, (name, shape) in itertools.product(CHANNELS, PIXELS.items()):
        draw, z = Vectors(channels), _images(shape)
        statistics = draw.statistics(z.numel() // shape[1])
        yield Case(f"{channels} channels, {name}", (*statistics, *draw.parameters(), z, 1e-5), {})
    draw, z = Vectors(65), _images(PIXELS["many pixels"])
    statistics, (gamma, beta) = draw.statistics(z.numel() // 3), draw.parameters()
    yield Case("no gamma", (*statistics, None, beta, z, 1e-5), {})
    yield Case("no beta", (*statistics, gamma, None, z, 1e-5), {})
    yield Case("no gamma, no beta", (*statistics, None, None, z, 1e-3), {})
    yield Case("eps 0", (statistics[0], statistics[1] + 1, gamma, beta, z, 0.0), {})
    yield Case("small gamma, large beta", (*statistics, gamma * 1e-6, beta * 64, z, 1e-5), {})
    mean, m2 = statistics
    yield Case("statistics not finite", (_special(mean, 8), _special(m2, 16), gamma, beta, z, 1e-5), {})
    special = _special(gamma, 8), _special(_special(beta, 8), 16)
    yield Case("parameters not finite", (mean, m2, *special, z, 1e-5), {})
    yield Case("pixels in another layout", (mean, m2, gamma, beta, z.contiguous(), 1e-5), {})


def bn_coefficients(dtype: torch.dtype) -> Iterator[Case]:
    for channels, (name, shape) in itertools.product(CHANNELS, PIXELS.items()):
        yield Case(f"{channels} channels, {name}", (*Vectors(channels).sums(), _images(shape)), {})
    z, vectors = _images(PIXELS["many pixels"]), Vectors(65).sums()
    for position, name in enumerate(("sum_g", "sum_gz", "mean", "rstd", "scale")):
        special = [_special(v, 8) if i == position else v for i, v in enumerate(vectors)]
        yield Case(f"{name} not finite", (*special, z), {})
    sum_g, _, mean, rstd, scale = vectors
    far = mean + 64
    yield Case("large mean", (sum_g, sum_g * 2**-4, far, rstd, scale, z), {})
    yield Case("pixels in another layout", (*vectors, z.contiguous()), {})


def running_affine(dtype: torch.dtype) -> Iterator[Case]:
    for channels in CHANNELS:
        draw = Vectors(channels)
        mean, var = draw.statistics(1)
        yield Case(f"{channels} channels", (mean, var, *draw.parameters(), draw.vector(), 1e-5), {})
    draw = Vectors(65)
    (mean, var), (gamma, beta), bias = draw.statistics(1), draw.parameters(), draw.vector()
    for given in itertools.product((gamma, None), (beta, None), (bias, None)):
        names = [name for name, t in zip(("gamma", "beta", "bias"), given, strict=True) if t is not None]
        yield Case(f"with {', '.join(names) or 'statistics alone'}", (mean, var, *given, 1e-3), {})
    yield Case("eps 0", (mean, var + 1, gamma, beta, None, 0.0), {})
    yield Case("statistics not finite", (_special(mean, 8), _special(var, 16), gamma, beta, bias, 1e-5), {})
    special = _special(gamma, 8), _special(_special(beta, 8), 16), _special(bias, 24)
    yield Case("parameters not finite", (mean, var, *special, 1e-5), {})


def running_update(dtype: torch.dtype) -> Iterator[Case]:
    def update(channels: int, counter: int | None, factor: float) -> tuple:
        draw = Vectors(channels)
        (mean, var), running = draw.statistics(1), (draw.vector(), draw.vector().exp())
        return (*running, None if counter is None else torch.tensor(counter), mean, var, factor)

    for momentum, count in itertools.product((0.0, 0.1, 1.0), (1, 2, 3, 4)):
        first, *others = [update(CHANNELS[i], (None, 0, 1 << 40, 7)[i], 1 + 1 / (i + 1)) for i in range(count)]
        yield Case(f"{count} norms, momentum {momentum}", (*first, momentum, *itertools.chain(*others)), {})
    yield Case("2048 channels", (*update(2048, 1, 784 / 783), 0.1), {})
    running_mean, running_var, counter, mean, var, factor = update(65, 1, 1.0)
    not_finite = (running_mean, running_var, counter, _special(mean, 8), _special(var, 16), factor, 0.1)
    yield Case("statistics not finite", not_finite, {})


CASES = {f.__name__: f for f in (bn_affine, bn_coefficients, running_affine, running_update)}
