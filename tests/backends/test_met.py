"""Calls of one form are answered once, and anew where an answer may have changed."""

import dataclasses

import pytest
import torch

from resnet_fused import backends
from resnet_fused.backends import Backend, Kernel, cards, dispatch, met
from resnet_fused.backends.selfcheck import judge
from resnet_fused.ops import OPS

BASE = torch.zeros(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)


def form(x, *args, **kwargs):
    return met.form("bn_stats", "auto", (x, *args), kwargs)


def test_equal_calls_have_equal_forms():
    assert form(BASE, None, [1, 2], eps=0.5) == form(BASE.clone(), None, (1, 2), eps=0.5)
    assert hash(form(BASE)) == hash(form(torch.nn.Parameter(BASE)))


@pytest.mark.parametrize(
    "other",
    [BASE[:1], BASE.contiguous(), BASE.bfloat16(), torch.zeros(513)[1:].view(2, 4, 4, 16).permute(0, 3, 1, 2)],
    ids=["shape", "strides", "dtype", "alignment"],
)
def test_what_binaries_depend_on_is_in_the_form(other):
    assert form(other) != form(BASE)


def test_values_names_and_assumed_cards_are_in_the_form():
    assert form(BASE, eps=0.5) != form(BASE, eps=0.25) != form(BASE, 0.25)
    before = form(BASE)
    with cards.assuming(cards.Card(80)):
        assert form(BASE) != before


def test_tensors_in_lists_count_by_their_form():
    assert form(BASE, [BASE, None]) == form(BASE, [BASE.clone(), None]) != form(BASE, [BASE[:1], None])
    assert form(BASE, [BASE], None) != form(BASE, [BASE, None]) and form(BASE, [torch.eye(2).to_sparse()]) is None


class Subclass(torch.Tensor):
    pass


def test_calls_that_are_not_plain_have_none():
    seen = []
    torch.vmap(lambda x: seen.append(form(x)) or x)(BASE)
    with torch.utils._python_dispatch.TorchDispatchMode():
        seen.append(form(BASE))
    seen += [form(BASE.as_subclass(Subclass)), form(BASE, torch.eye(2).to_sparse())]
    assert seen == [None] * 4


@pytest.fixture
def asked(monkeypatch):
    """The shapes that a backend of one kernel was asked about, and the backend."""
    shapes = []

    def unsupported(z, *args, **kwargs):
        shapes.append(tuple(z.shape))
        return []

    kernel = Kernel(OPS["bn_stats"].reference, (torch.float32,), unsupported)
    backend = Backend("asked", ("cpu",), {"bn_stats": kernel})
    monkeypatch.setattr(dispatch, "_backends", {"asked": backend, **backends.backends()})
    dispatch.forget()
    return shapes, backend


def test_one_answer_for_calls_of_a_form(asked):
    shapes, _ = asked
    for x in (BASE, BASE.clone(), BASE[:1], BASE):
        backends.run("bn_stats", x)
    assert shapes == [(2, 16, 4, 4), (1, 16, 4, 4)]


def test_an_answer_is_given_anew_once_a_verdict_changes(asked):
    shapes, _ = asked
    backends.run("bn_stats", BASE)
    judge._known["nobody", "bn_stats", torch.float32, BASE.device, "here"] = "an objection"
    backends.run("bn_stats", BASE)
    del judge._known["nobody", "bn_stats", torch.float32, BASE.device, "here"]
    assert len(shapes) == 2


def test_an_answer_is_given_anew_once_a_kernel_is_another(asked):
    shapes, backend = asked
    backends.run("bn_stats", BASE)
    ran = []
    run = lambda z, *args, **kwargs: ran.append(z) or OPS["bn_stats"].reference(z, *args, **kwargs)  # noqa: E731
    backend.kernels["bn_stats"] = dataclasses.replace(backend.kernels["bn_stats"], run=run)
    backends.run("bn_stats", BASE)
    assert len(shapes) == 2 and len(ran) == 1


def test_a_doubt_is_raised_at_every_call(asked, monkeypatch):
    """During a capture of a CUDA graph it passes by itself."""
    shapes, backend = asked
    backend.kernels["bn_stats"] = dataclasses.replace(backend.kernels["bn_stats"], needs_selfcheck=True)
    doubts = iter(["not now", ""])
    monkeypatch.setattr(judge, "doubt", lambda *call: next(doubts))
    for _ in range(3):
        backends.run("bn_stats", BASE)
    assert len(shapes) == 2, "the first answer was kept, or the second was not"


def test_a_shorter_way_is_asked_for_once_and_taken(asked):
    _, backend = asked
    prepared, taken = [], []

    def prepare(args, kwargs):
        prepared.append((len(args), tuple(kwargs)))
        return lambda given: taken.append(len(given)) or OPS["bn_stats"].reference(*given[:1], eps=given[1])

    backend.kernels["bn_stats"] = dataclasses.replace(backend.kernels["bn_stats"], prepare=prepare)
    first, second = (backends.run("bn_stats", BASE, eps=0.5) for _ in range(2))
    assert prepared == [(1, ("eps",))] and taken == [2, 2]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_more_answers_than_are_remembered(asked, monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_ANSWERS", 2)
    for n in (1, 2, 3, 4, 5):
        backends.run("bn_stats", torch.zeros(n, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    assert len(dispatch._answers) <= 2
