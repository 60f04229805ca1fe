"""Functions repeated by what they dispatched: the same results, and none of the function, or the function itself."""

import weakref

import pytest
import torch
from torch.nn import functional as F

from resnet_fused.backends import tape


@pytest.fixture(autouse=True)
def early(monkeypatch):
    monkeypatch.setattr(tape, "PLAIN", 1)


def repeated(function, *calls):
    """Results of `function` for each of `calls`, how often it ran, and its tape."""
    ran = []

    def once(*given):
        ran.append(1)
        return function(*given), "beside"

    again = tape.Repeated()
    found = [again(once, given) for given in calls]
    assert all(beside == "beside" for _, beside in found)
    return [results for results, _ in found], len(ran), again.tape


def pairs(count=4, *shape):
    return [(torch.randn(*(shape or (3, 4))), torch.randn(*(shape or (3, 4)))) for _ in range(count)]


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: [a + b, None, a.view(-1)[2:6]],
        lambda a, b: [(a * 2.5).relu_(), a],
        lambda a, b: [*torch._foreach_add([a, b], 1), torch.zeros(3, dtype=torch.float64)],
        lambda a, b: [a.t().contiguous(), b.to(torch.bfloat16), a.sum((0,), dtype=torch.float64)],
        lambda a, b: [*torch.aminmax(a), torch.addmm(a, b[:, :3], a[:3], alpha=0.5)],
        lambda a, b: [a.new_empty(0), tape.noted(torch.Tensor.detach, a) + b],
    ],
)
def test_a_call_of_one_form_is_repeated(function):
    calls = pairs()
    found, ran, kept = repeated(function, *calls)
    assert ran == 2 and kept is not None
    for results, given in zip(found, calls, strict=True):
        expected = function(*given)
        assert len(results) == len(expected)
        for result, wanted in zip(results, expected, strict=True):
            assert (result is None) == (wanted is None)
            if wanted is not None:
                assert result.stride() == wanted.stride()
                torch.testing.assert_close(result, wanted, rtol=0, atol=0)


def test_writes_land_where_the_function_writes():
    def function(a, b):
        a.view(-1)[:2].add_(b.view(-1)[:2])
        return [a]

    calls = pairs()
    expected = [function(a.clone(), b)[0] for a, b in calls]
    found, ran, _ = repeated(function, *calls)
    assert ran == 2
    for (result,), wanted, (a, _) in zip(found, expected, calls, strict=True):
        assert result is a and a.equal(wanted)


OUTSIDE = torch.ones(4)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: [a if a.sum().item() > 0 else b],
        lambda a, b: [a if bool((a > b).any()) else b],
        lambda a, b: [a if torch.equal(a, b) else b],
        lambda a, b: [a[a > 0]],
        lambda a, b: [a.nonzero()],
        lambda a, b: [a + OUTSIDE],
        lambda a, b: [OUTSIDE],
    ],
    ids=["item", "bool", "equal", "mask", "nonzero", "constant", "foreign"],
)
def test_what_depends_on_values_or_comes_from_elsewhere_is_not(function):
    calls = pairs()
    found, ran, kept = repeated(function, *calls)
    assert ran == len(calls) and kept is None
    for (result,), given in zip(found, calls, strict=True):
        assert result.equal(function(*given)[0])


def test_one_tensor_given_twice_is_repeated_where_it_is_again():
    def function(a, b):
        return [a + 2 * b]

    (a, b), (c, d) = pairs(2)
    found, ran, kept = repeated(function, (a, a), (a, a), (b, b), (c, d))
    assert kept is not None and ran == 3
    assert found[2][0].equal(3 * b) and found[3][0].equal(c + 2 * d)


def test_tensors_are_freed_when_nobody_reads_them_any_more():
    def function(a, b):
        return [((a + 1) * b).exp().sum()]

    _, _, kept = repeated(function, *pairs())
    made = [line for line in kept.code.splitlines() if " = None" in line]
    assert len(made) >= 3, kept.code


def test_a_convolution_is_laid_out_as_recorded(monkeypatch):
    """cuDNN may be switched off, or on, between two calls."""

    def function(x, w):
        return [torch.ops.aten.convolution.default(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)]

    x, w = torch.randn(2, 3, 5, 6).contiguous(memory_format=torch.channels_last), torch.randn(4, 3, 3, 3)
    again = tape.Repeated()
    for _ in range(2):
        (first,), _ = again(lambda *given: (function(*given), None), (x, w))
    (second,), _ = again(None, (x.contiguous(), w))
    assert second.stride() == first.stride()
    torch.testing.assert_close(second, F.conv2d(x, w, padding=1))


def test_nothing_is_known_of_an_error():
    def function(a, b):
        raise RuntimeError("out of memory")

    again = tape.Repeated()
    for _ in range(4):
        with pytest.raises(RuntimeError, match="out of memory"):
            again(function, pairs(1)[0])
    assert again.tape is None and tape._scope.listener is None


def test_what_is_listened_to_keeps_no_memory():
    alive = []

    def function(a, b):
        made = [a + b]
        for _ in range(3):
            alive.append(weakref.ref(made[0]))
            made[0] = made[0] * 2  # in whose place another comes to lie
        return made

    _, ran, kept = repeated(function, *pairs())
    assert ran == 2 and kept is not None and not any(ref() is not None for ref in alive)
    a, b = pairs(1)[0]
    assert kept.repeat(a, b)[0].equal(8 * (a + b))


def test_versions_move_as_the_function_moves_them():
    def function(a, b):
        torch._foreach_add_([a, b], 1)
        a.add_(1)
        return [a]

    a, b = pairs(1)[0]
    again, seen = tape.Repeated(), []
    for _ in range(4):
        before = a._version, b._version
        again(lambda *given: (function(*given), None), (a, b))
        seen.append((a._version - before[0], b._version - before[1]))
    assert again.tape is not None and seen == [(2, 1)] * 4


def test_tapes_are_freed():
    """By whoever keeps them: no cache of PyTorch's has their code."""
    from torch.fx.graph_module import _loader

    before = len(_loader.eval_cache)
    _, _, kept = repeated(lambda a, b: [a + b], *pairs())
    assert kept is not None and len(_loader.eval_cache) == before


def test_kernels_memory_is_allocated_as_it_was(monkeypatch):
    shape, stride = (2, 3, 4, 5), (60, 1, 15, 3)

    def function(a):
        return [tape.noted(torch.empty_strided, shape, stride).copy_(a)]

    def written(graph):
        for node in graph.nodes:
            if node.target is torch.empty_strided:
                node.kwargs = {"dtype": torch.float32, "device": torch.device("cpu")}
        return short(graph)

    short = tape._allocate_short
    monkeypatch.setattr(tape, "_allocate_short", written)
    given = [(torch.randn(shape),) for _ in range(4)]
    results, ran, made = repeated(function, *given)
    assert ran == 2 and "empty_on_cpu" in made.code
    for (result,), (a,) in zip(results, given, strict=True):
        assert result.stride() == stride and torch.equal(result, a)
