"""Programs in evaluation, on the CPU and as on a GPU: stock's values in float64, and never more launches than stock."""

import dataclasses
import itertools

import pytest
import torch
from evaluated import FROZEN, MORE, P1, error, evaluate, frozen, modules_of, moved, stock_output
from programs import CASES, F64, NONE, conv_tensors, norm_tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from tuned import unsound

from resnet_fused.backends import onednn
from resnet_fused.blocks.kept_evaluation import takes
from resnet_fused.library import status
from resnet_fused.plan import choose
from resnet_fused.plan.devices import DEVICES
from resnet_fused.plan.lower_evaluation import lower
from resnet_fused.steps import Norm, folding, unfolded
from resnet_fused.steps.program import Addition, Call, Convolution, Normalisation, Program
from resnet_fused.traffic.count import Counter

PACKS = status().cpu.loaded and torch.float32 in onednn.SERVED


@pytest.fixture(params=[*CASES, *MORE])
def case(request):
    """A call in float64 with an input of 9x8 pixels, and stock's output."""
    torch.manual_seed(0)
    program, tensors = frozen(*(CASES | MORE)[request.param]())
    x = torch.randn(3, 6, 9, 8, dtype=F64).contiguous(memory_format=torch.channels_last)
    call = Call(program, x, tensors)
    if program.inputs == 2:
        call = call._replace(residual=torch.randn(call.shapes()[-1], dtype=F64))
    return call, stock_output(call)


@pytest.fixture(params=[*CASES, *MORE])
def few(request):
    """A call in float64 with so few pixels that weights are read as they are, of both layouts."""
    torch.manual_seed(0)
    program, tensors = frozen(*(CASES | MORE)[request.param]())
    if any(isinstance(node, Convolution) and node.conv.groups > 1 for node in program.nodes):
        pytest.skip("a grouped convolution is none of them")
    for own in tensors[::2]:
        if own.weight is not None:
            own.weight.data = own.weight.data.contiguous(memory_format=torch.channels_last)
    call = Call(program, torch.randn(1, 6, 4, 4, dtype=F64), tensors)
    if program.inputs == 2:
        call = call._replace(residual=torch.randn(call.shapes()[-1], dtype=F64))
    return call


def test_the_reference_has_stocks_values(case):
    call, exact = case
    before = call.x.clone()
    assert takes(call)
    torch.testing.assert_close(evaluate(moved(call, F64, "reference")), exact, rtol=1e-10, atol=1e-10)
    assert torch.equal(call.x, before)  # nothing is written in place that came from outside


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_has_stocks_values(case, dtype, kept):
    call, exact = case
    narrow = moved(call, dtype)
    exact = stock_output(moved(narrow, F64))
    theirs = stock_output(narrow)
    modules = modules_of(call) if kept else None
    before = [t.clone() for t in narrow.inputs]
    for _ in range(3):  # at first sight, for a known shape, and settled
        got = evaluate(narrow, modules)
        assert got.dtype == dtype
        assert error(got, exact) <= 2 * error(theirs, exact) + (2e-6 if dtype == torch.float32 else 4e-3)
    assert all(map(torch.equal, narrow.inputs, before))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kept", [False, True])
def test_few_pixels_have_stocks_values_and_see_every_write(few, dtype, kept):
    call = moved(few, dtype)
    modules = modules_of(call) if kept else None
    with choose.observing() as said:
        lower(call)
    assert "few pixels" in said[0] or not any(isinstance(node, Convolution) for node in call.program.nodes)
    before = [t.clone() for t in call.inputs]
    for _ in range(2):
        exact, theirs = stock_output(moved(call, F64)), stock_output(call)
        got = evaluate(call, modules)
        assert got.dtype == dtype and error(got, exact) <= 2 * error(theirs, exact) + (2e-6 if dtype != F64 else 1e-14)
        for own in call.tensors:
            for t in own[:6]:
                if t is not None:
                    t.data.mul_(1.25)
    assert all(map(torch.equal, call.inputs, before))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_among_few_pixels(few, value):
    x = few.x.clone()
    x[0, 0, 0, 0] = x[0, 1, 1, 1] = value
    call = moved(few._replace(x=x), torch.float32)
    got, want = evaluate(call, modules_of(call)), stock_output(call)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got.isinf(), want.isinf())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_stock_has_it(case, value):
    call, _ = case
    x = call.x.clone()
    x[0, 0, 0, 0] = x[1, 1, 1, 1] = value
    single = moved(call._replace(x=x), torch.float32)
    got, want = evaluate(single, modules_of(call)), stock_output(single)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got.isinf(), want.isinf())


def test_a_gpu_has_stocks_values(case):
    call, exact = case
    with choose.planning_for(DEVICES["h100"]), choose.observing() as notes:
        got = evaluate(moved(call, F64, "reference"))
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)
    assert len(notes) == 1 and notes[0].startswith("evaluation: ")


@pytest.mark.parametrize("lacks", ["", "conv1x1_join", "norm_add_relu", "norm_relu_pool", "running_affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_moves_and_launches_no_more_than_stock(monkeypatch, case, lacks, dtype):
    call, _ = case
    unsound(monkeypatch, lacks)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        large = call._replace(x=torch.empty(8, 6, 64, 64, dtype=F64))
        fakes = [type(own)(*(t if t is None else mode.from_tensor(t) for t in own)) for own in call.tensors]
        large = large._replace(tensors=fakes)
        if call.program.inputs == 2:
            large = large._replace(residual=torch.empty(large.shapes()[-1], dtype=F64))
        large = moved(large, dtype)
        large = large._replace(x=large.x.contiguous(memory_format=torch.channels_last))
        if large.residual is not None:
            large = large._replace(residual=large.residual.contiguous(memory_format=torch.channels_last))
        counts = []
        for run in (stock_output, evaluate):
            with choose.planning_for(DEVICES["h100"]), Counter() as counter, torch.no_grad():
                run(large)
            counts.append(counter.total)
    stock, ours = counts
    assert ours.launches <= stock.launches and ours.bytes <= stock.bytes
    assert lacks not in {operation.name for operation in ours.operations}


def test_calls_of_training_are_refused():
    program, tensors = frozen(*CASES["identity"]())
    call = Call(program, torch.randn(2, 6, 5, 5, dtype=F64), tensors)
    batch = dataclasses.replace(program, nodes=(Normalisation(0, Norm()), *program.nodes[1:]))
    wrongs = [call._replace(program=batch), call._replace(sample_factor=torch.ones(2, dtype=F64))]
    for wrong, dtype in itertools.product(wrongs, (torch.float32, F64)):
        assert not takes(wrong)
        with pytest.raises(ValueError, match="evaluation takes no"):
            evaluate(moved(wrong, dtype)._replace(sample_factor=wrong.sample_factor), modules_of(call))


ODD = {
    "a sum of two shapes": lambda: (Program((Convolution(0, P1), Addition(1, 0))), [conv_tensors(6, 1), NONE]),
    "a value to itself": lambda: (Program((Convolution(0, P1), Addition(1, 1))), [conv_tensors(6, 6), NONE]),
    "a sum of two activations": lambda: (
        Program((Normalisation(0, FROZEN), Normalisation(0, FROZEN), Addition(1, 2))),
        [norm_tensors(6), norm_tensors(6), NONE],
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_no_step_adds_is_stocks(name):
    program, tensors = frozen(*ODD[name]())
    call = moved(Call(program, torch.randn(2, 6, 5, 5, dtype=F64), tensors), torch.float32)
    torch.testing.assert_close(evaluate(call, modules_of(call)), stock_output(call))
    with choose.planning_for(DEVICES["h100"]), choose.observing() as notes:
        torch.testing.assert_close(evaluate(call), stock_output(call))
    assert notes[0].startswith("stock (")


@pytest.mark.skipif(not PACKS, reason="no weights are packed here")
def test_a_pre_activation_block_keeps_what_it_made(monkeypatch):
    """Weights with and without norms, and norms by themselves; every write is seen, past the counter too."""
    monkeypatch.setattr(unfolded, "IS_FAST", False)  # all of oneDNN's
    packs, original = [], onednn.prepack
    monkeypatch.setattr(onednn, "prepack", lambda *args: packs.append(1) or original(*args))
    monkeypatch.setattr(folding, "_layouts", folding._Layouts())
    program, tensors = frozen(*CASES["projection"]())
    call = moved(Call(program, torch.randn(2, 6, 5, 5, dtype=F64), tensors), torch.float32)
    modules = modules_of(call)
    for _ in range(4):
        evaluate(call, modules)
    assert len(packs) == 4
    for i, own in itertools.product(range(6), call.tensors):
        if own[i] is not None:
            own[i].numpy().__imul__(1.5)
            torch.testing.assert_close(evaluate(call, modules), stock_output(call), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not PACKS, reason="no weights are packed here")
def test_the_last_convolution_is_added_to_its_projection_in_place(monkeypatch):
    monkeypatch.setattr(unfolded, "IS_FAST", False)  # all of oneDNN's
    seen, original = [], onednn.conv_packed
    monkeypatch.setattr(onednn, "conv_packed", lambda *args: seen.append(args[6:8]) or original(*args))
    for name, in_place in [("identity", False), ("projection", True), ("activated shortcut", False)]:
        seen.clear()
        program, tensors = frozen(*CASES[name]())
        call = moved(Call(program, torch.randn(2, 6, 5, 5, dtype=F64), tensors), torch.float32)
        evaluate(call, modules_of(call))
        assert [added for residual, added in seen if residual is not None] == [in_place]
