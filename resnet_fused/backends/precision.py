"""How exact float32 convolutions are to be: as stock's, or faster with an error that is larger by a known factor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

WORDS = ("default", "fast")


class _Settings:
    """Process-wide: a plain attribute is what ``torch.compile`` can guard on."""

    word: str | None = None


_settings = _Settings()


def check_word(word: str, words: Iterable[str] = WORDS, what: str = "precision") -> str:
    """Return `word` if it is one of `words`; else raise ValueError that lists what is accepted."""
    if word not in words:
        raise ValueError(f"unknown {what} {word!r}; pass one of {', '.join(map(repr, words))}")
    return word


def asked() -> str | None:
    """What the innermost :func:`precision` asks for; None outside of any."""
    return _settings.word


def of(own: str) -> str:
    """What holds for a model that was fused with the precision `own`."""
    return own if _settings.word is None else _settings.word


@contextlib.contextmanager
def precision(word: str) -> Iterator[None]:
    """How exact float32 convolutions on CPUs are within a ``with`` block, whatever models were fused with.

    It holds for the whole process. A forward run inside the block is as exact in its backward too.

    * "default": 3x3 convolutions of stride 1 may run as Winograd's F(2x2, 3x3), with 0.4 to 0.95 of oneDNN's root mean
      square error against float64 on what networks have, and up to 1.5 of it where 93% of the inputs are zeros.
    * "fast": they, and in training their input's gradient, may run as F(4x4, 3x3) too, on up to 1.8 times fewer
      multiplications. Of oneDNN's error it was seen to have 1.7 to 2.3 on normal and post-ReLU inputs of 37 to 512
      channels and 0.4 to 1.4 on those with a mean; up to 6 where 93% of the inputs are zeros, 4 where they lie decades
      apart. It is relative to the largest values of 6x6 pixels: beside them small ones lose digits, and where stock
      gives exact zeros, it gives values of the size of that error.

    With both, NaN and infinities of the input reach what they reach in stock.

    Raises:
        ValueError: `word` is neither.
    """
    before, _settings.word = _settings.word, check_word(word)
    try:
        yield
    finally:
        _settings.word = before
