"""A program's output made again from what its node keeps: the very bits, and nothing more is kept for it."""

import dataclasses

import pytest
import torch
from programs import F64, NORM, P1, P3, S1, conv_tensors, norm_tensors

from resnet_fused.ops import activation
from resnet_fused.plan.lower import steps_of
from resnet_fused.plan.variants import Variant
from resnet_fused.steps import Act, Call, Norm
from resnet_fused.steps.flow import Handed
from resnet_fused.steps.program import Convolution, Normalisation, Program
from resnet_fused.steps.program_node import run_program
from resnet_fused.steps.remade import make

GRAM, VALUES, ALL = Variant(gram=True), Variant(True), Variant(True, gram=True)
#: The last norm, the last convolution, the variant, and the convolution's bias.
ENDS = {
    "plain": (NORM, P1, Variant(), False),
    "Gram": (NORM, P1, GRAM, False),
    "plain on values": (NORM, P1, VALUES, False),
    "Gram on values": (NORM, P1, ALL, False),
    "running statistics, bias": (Norm(batch_stats=False), P1, GRAM, True),
    "running statistics, stride": (Norm(batch_stats=False), S1, GRAM, False),
    "3x3": (NORM, P3, Variant(), True),
}


def called(norm, conv, bias, dtype, act=None, relu=False):
    """Of a 3x3 with a norm and a ReLU, and a last convolution with its norm."""
    torch.manual_seed(0)
    last = Normalisation(3, norm, relu, act=act)
    nodes = (Convolution(0, P3), Normalisation(1, NORM), Convolution(2, conv), last)
    size = 3 if conv is P3 else 1
    tensors = [conv_tensors(16, 8, 3), norm_tensors(8), conv_tensors(8, 16, size, bias), norm_tensors(16)]
    cast = [[t if t is None or t.dim() < 1 else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in own]
            for own in tensors]  # fmt: skip
    x = torch.randn(3, 16, 6, 7, dtype=F64).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    backend = "auto" if dtype == torch.float32 else "reference"
    program = Program(nodes, backend=backend, prefer="memory")
    return Call(program, x, [type(own)(*found) for own, found in zip(tensors, cast, strict=True)])


def assert_made_again(call, variant):
    lowered, handed = steps_of(call, variant), Handed()
    out = run_program(lowered, call, handed)
    (facts, kept), place = handed.source, out.untyped_storage().data_ptr()
    assert all(t is None or t.untyped_storage().data_ptr() != place for t in kept)
    by_node = {t.data_ptr() for t in out.grad_fn.saved_tensors if t is not None}
    copies = [t for t in kept if t is not None and t.data_ptr() not in by_node]
    assert [t.shape for t in copies if t.dim() > 1] == ([call.tensors[2].weight.shape] if variant.gram else [])
    assert sum(t is not None and t.dim() == 4 for t in kept) == 1 + variant.gram
    expected = out.detach().clone()
    out.sum().backward()
    for own in call.tensors:  # which nothing sees
        for t in own[:4]:
            if t is not None:
                t.data.mul_(-1.7)
    assert torch.equal(make(facts, kept), expected)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("end", ENDS)
def test_it_is_made_bit_for_bit(end, dtype):
    norm, conv, variant, bias = ENDS[end]
    call = called(norm, conv, bias, dtype)
    if variant.values and dtype == torch.float32:
        call = call._replace(program=dataclasses.replace(call.program, backend="reference"))
    assert_made_again(call, variant)


@pytest.mark.parametrize("act", [None, Act(activation.SILU)])
def test_with_an_activation(act):
    assert_made_again(called(NORM, P3, False, torch.float32, act, relu=act is None), Variant())


def test_none_where_a_copy_of_the_weight_would_be_larger():
    call = called(NORM, P1, False, torch.float32)
    small = call._replace(x=call.x.detach()[:1, :, :2, :2].contiguous(memory_format=torch.channels_last))
    for one, made in ((call, True), (small._replace(x=small.x.requires_grad_()), False)):
        handed = Handed()
        run_program(steps_of(one, GRAM), one, handed)
        assert (handed.source is not None) is made


def test_none_of_what_somebody_else_may_write_to():
    """A Gram join's convolution that reads the program's input."""
    call = called(NORM, P1, False, torch.float32)
    program = Program((Convolution(0, P1), Normalisation(1, NORM, False)), backend="auto", prefer="memory")
    x = torch.randn(3, 8, 6, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    handed, alone = Handed(), call._replace(program=program, x=x, tensors=call.tensors[2:])
    run_program(steps_of(alone, GRAM), alone, handed)
    assert handed.source is None


def test_none_where_it_is_kept_anyway_or_not_to_be():
    for call, variant in (
        (called(NORM, P1, False, F64, relu=True), GRAM),  # whose ReLU keeps it
        (called(NORM, P1, False, F64)._replace(program=dataclasses.replace(
            called(NORM, P1, False, F64).program, prefer="speed")), GRAM),
    ):  # fmt: skip
        handed = Handed()
        run_program(steps_of(call, variant), call, handed)
        assert handed.source is None
