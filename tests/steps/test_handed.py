"""Statistics of a sum, emitted with it and handed to the program that reads it next: the same results without."""

import dataclasses

import pytest
import torch
from programs import CASES, leaves_of, preact_bottleneck

from resnet_fused import library
from resnet_fused.backends import backends
from resnet_fused.plan import choose, cpu_values, words
from resnet_fused.plan.devices import DEVICES
from resnet_fused.plan.lower import lower, steps_of
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import batch_norm
from resnet_fused.steps.flow import Handed
from resnet_fused.steps.kinds import ConvolveAndAdd, Normalise
from resnet_fused.steps.program import Addition, Call, Normalisation
from resnet_fused.steps.program_node import run_program

needs_library = pytest.mark.skipif(not library.status().cpu.loaded, reason="a kernel of the compiled library")


def cast(tensors, dtype):
    """The tensors of nodes in `dtype`, norms' in float32 at least."""
    found = []
    for own in tensors:
        wide = torch.promote_types(dtype, torch.float32)
        kinds = dict.fromkeys(("weight", "bias"), dtype)
        made = {
            name: None if t is None else t.detach().to(kinds.get(name, wide) if t.is_floating_point() else t.dtype)
            for name, t in own._asdict().items()
        }
        found.append(type(own)(**made))
    return found


def pair(dtype, **kwargs):
    """Two blocks, the input of the first, and a factor for the second where it takes one."""
    torch.manual_seed(0)
    made = [preact_bottleneck(**kwargs) for _ in range(2)]
    return [(program, cast(tensors, dtype)) for program, tensors in made]


def two_blocks(pairs, x, handing, factor=None):
    """Output, gradients and running statistics of two blocks behind each other."""
    handed, h = None, x
    for program, tensors in pairs:
        for own in tensors:
            for name in ("weight", "bias", "gamma", "beta"):
                t = getattr(own, name)
                if t is not None:
                    t.requires_grad_().grad = None
        call = Call(program, h, tensors, None, factor)
        handed = Handed(handed.leaving if handing and handed else None)
        h = run_program(lower(call), call, handed)
        assert handed.leaving is not None
    leaves = {f"{i}{name}": t for i, (_, own) in enumerate(pairs) for name, t in leaves_of(x, own).items()}
    cotangent = torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(h, list(leaves.values()), cotangent)
    running = [t.clone() for _, tensors in pairs for own in tensors for t in own[4:] if t is not None]
    return [h.detach(), *grads, *running]


@needs_library
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_handed_statistics_are_those_of_the_tensor_to_the_bit(dtype, far):
    mean = far * (1e4 if dtype != torch.float16 else 1e3)  # whose gradients stay finite
    x = (torch.randn(3, 6, 9, 7, dtype=torch.float64) + mean).to(dtype).requires_grad_()
    handed, alone = (two_blocks(pair(dtype), x, handing) for handing in (True, False))
    assert len(handed) == len(alone) and all(torch.equal(a, b) for a, b in zip(handed, alone, strict=True))


@needs_library
def test_a_factor_for_each_sample_is_applied_before_the_sum():
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor([0.0, 2.0, 2.0, 0.5], dtype=torch.float64)
    handed, alone = (two_blocks(pair(torch.float64, sampled=True), x, h, factor) for h in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(handed, alone, strict=True))
    first = pair(torch.float64, sampled=True)[:1]
    dropped = two_blocks(first, x, False, torch.zeros(4, dtype=torch.float64))[0]
    torch.testing.assert_close(dropped, x.detach(), rtol=0, atol=0)


@needs_library
def test_a_norm_with_statistics_from_outside_does_not_read_for_them(monkeypatch):
    read, original = [], batch_norm.normalise
    monkeypatch.setattr(batch_norm, "normalise", lambda z, *rest: read.append(z.shape[1]) or original(z, *rest))
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    two_blocks(pair(torch.float64), x.requires_grad_(), False)
    assert read == [6, 4, 4] * 2
    read.clear()
    two_blocks(pair(torch.float64), x, True)
    assert read == [6, 4, 4, 4, 4]


@needs_library
def test_within_a_program_every_norm_of_a_sum_takes_its_statistics(monkeypatch):
    program, tensors = CASES["two norms of one value"]()
    call = Call(program, torch.randn(2, 6, 5, 5, dtype=torch.float64), tensors)
    steps = lower(call).steps
    assert [s.statistics for s in steps if isinstance(s, ConvolveAndAdd)] == [True, False, True]
    assert [s.emitted for s in steps if isinstance(s, Normalise)] == [False, False, True]
    read, original = [], batch_norm.normalise
    monkeypatch.setattr(batch_norm, "normalise", lambda z, *rest: read.append(z) or original(z, *rest))
    handed = Handed((torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)))
    run_program(lower(call), call, handed)
    assert not read, "both norms of the input take those from outside"


def with_norms(program, **settings):
    nodes = [
        dataclasses.replace(n, norm=dataclasses.replace(n.norm, **settings)) if isinstance(n, Normalisation) else n
        for n in program.nodes
    ]
    return dataclasses.replace(program, nodes=tuple(nodes))


def clamped(program):
    *nodes, last = program.nodes
    return dataclasses.replace(program, nodes=(*nodes, dataclasses.replace(last, relu=True)))


def sums(program, tensors, dtype=torch.float32):
    call = Call(program, torch.randn(2, 6, 5, 5, dtype=dtype), cast(tensors, dtype))
    return call, [step for step in steps_of(call, Variant()).steps if isinstance(step, ConvolveAndAdd)]


@needs_library
def test_which_sums_emit_statistics():
    program, tensors = preact_bottleneck()
    call, (step,) = sums(program, tensors)
    assert step.statistics and "add_stats_" in step.ops(program)
    assert words.of_step(step, program) == "convolution and sum with its statistics"
    with choose.planning_for(DEVICES["h100"]):
        assert not any(s.statistics for s in steps_of(call, Variant()).steps if isinstance(s, ConvolveAndAdd))
    for other in (
        with_norms(program, batch_stats=False),
        clamped(program),
        dataclasses.replace(program, backend="reference"),
    ):
        assert not sums(other, tensors)[1][0].statistics
    raw = CASES["a raw value read twice"]()
    assert isinstance(raw[0].nodes[-1], Addition) and not sums(*raw)[1][0].statistics  # it begins with a convolution


def test_without_the_library_nothing_emits(monkeypatch):
    now = library.status()
    missing = dataclasses.replace(now, cpu=dataclasses.replace(now.cpu, reason="not built"))
    monkeypatch.setattr(cpu_values, "status", lambda: missing)
    assert not sums(*preact_bottleneck())[1][0].statistics


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_op_is_a_sum_and_bn_stats_to_the_bit(dtype):
    kernels = backends()["cpu"].kernels
    for shape in ((2, 65, 3, 5), (3, 64, 40, 40), (2, 600, 9, 9)):
        out, other = (torch.randn(shape).add(3).to(dtype).contiguous(memory_format=torch.channels_last) for _ in "ab")
        expected = out + other
        got = kernels["add_stats_"].run(out, other)
        assert torch.equal(out, expected)
        assert all(map(torch.equal, got, kernels["bn_stats"].run(expected)))
