"""Programs in evaluation, on the CPU and as on a GPU: stock's values in float64, and never more launches than stock."""

import dataclasses
import itertools

import pytest
import torch
from evaluated import evaluate
from programs import CASES, F64, NONE, conv_tensors, norm_tensors
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tuned import unsound

from resnet_fused.backends import onednn
from resnet_fused.blocks.evaluation import takes
from resnet_fused.library import status
from resnet_fused.plan import choose
from resnet_fused.plan.devices import DEVICES
from resnet_fused.plan.evaluation import lower
from resnet_fused.steps import Conv, Norm, Pool, folding
from resnet_fused.steps.program import Addition, Call, Convolution, Normalisation, Pooling, Program, residual_program
from resnet_fused.steps.stock import program_output
from resnet_fused.traffic.count import Counter

FROZEN, P1, P3 = Norm(batch_stats=False), Conv(), Conv(padding=(1, 1))
PACKS = status().cpu.loaded and torch.float32 in onednn.SERVED


def frozen(program, tensors):
    """A program with running statistics, no sample factors, and tensors that want no gradients."""
    nodes = []
    for node in program.nodes:
        node = dataclasses.replace(node, norm=FROZEN) if isinstance(node, Normalisation) else node
        nodes.append(dataclasses.replace(node, sampled=False) if hasattr(node, "sampled") else node)
    own = [type(t)(*(one if one is None else one.detach() for one in t)) for t in tensors]
    return dataclasses.replace(program, nodes=tuple(nodes)), own


def pooled():
    """A stem: convolution, norm, ReLU and pool."""
    nodes = (Convolution(0, P3), Normalisation(1, FROZEN), Pooling(2, Pool()))
    return Program(nodes), [conv_tensors(6, 5, 3, bias=True), norm_tensors(5), NONE]


def residual_from_outside(relu=True):
    program = residual_program([(P3, FROZEN), (P1, FROZEN)], residual="tensor", relu=relu)
    return program, [conv_tensors(6, 4, 3), norm_tensors(4), conv_tensors(4, 7), norm_tensors(7), NONE]


def bare_norm_of_a_sum():
    """A norm without ReLU that two convolutions read, and one that ends the program."""
    nodes = (
        Convolution(0, P1), Addition(1, 0, True), Normalisation(2, FROZEN, False), Convolution(3, P3),
        Convolution(3, P1), Addition(5, 4), Normalisation(6, FROZEN, False),
    )  # fmt: skip
    convs = [conv_tensors(6, 6), conv_tensors(6, 6, 3, bias=True), conv_tensors(6, 6, bias=True)]
    return Program(nodes), [convs[0], NONE, norm_tensors(6), convs[1], convs[2], NONE, norm_tensors(6)]


def norms_on_both_sides():
    """A sum of a convolution and of a norm of the input, and one of two norms of it."""
    nodes = (
        Normalisation(0, FROZEN, False), Convolution(0, P3), Addition(2, 1, True), Normalisation(3, FROZEN, False),
        Normalisation(3, FROZEN, False), Addition(4, 5, True),
    )  # fmt: skip
    return Program(nodes), [norm_tensors(6), conv_tensors(6, 6, 3), NONE, norm_tensors(6), norm_tensors(6), NONE]


def plain_products():
    """1x1 convolutions without norms: one that a sum with ReLU follows, one with a projection, one with neither."""
    nodes = (Convolution(0, P1), Addition(1, 0, True), Convolution(2, P1), Convolution(2, P1), Addition(3, 4))
    nodes += (Convolution(5, P1), Addition(6, 5))
    convs = [conv_tensors(6, 6, bias=bias) for bias in (True, False, True, False)]
    return Program(nodes), [convs[0], NONE, convs[1], convs[2], NONE, convs[3], NONE]


def grouped():
    nodes = (Convolution(0, Conv(padding=(1, 1), groups=2)), Normalisation(1, FROZEN), Convolution(2, P1))
    return Program(nodes), [conv_tensors(3, 4, 3), norm_tensors(4), conv_tensors(4, 5, bias=True)]


def two_readers_of_a_norm(plain):
    """A norm that two 1x1 convolutions read: both add, or one has a norm of its own."""
    nodes = [Normalisation(0, FROZEN), Convolution(1, P1), Addition(2, 0), Convolution(1, P1)]
    tensors = [norm_tensors(6), conv_tensors(6, 6), NONE, conv_tensors(6, 6)]
    if not plain:
        nodes.append(Normalisation(4, FROZEN))
        tensors.append(norm_tensors(6))
    nodes += [Convolution(len(nodes), P3), Addition(len(nodes) + 1, 3)] if not plain else [Addition(4, 3)]
    return Program(tuple(nodes)), [*tensors, *([] if plain else [conv_tensors(6, 6, 3)]), NONE]


MORE = {
    "a norm of two sums": lambda: two_readers_of_a_norm(True),
    "a norm of a sum and a convolution": lambda: two_readers_of_a_norm(False),
    "pooled": pooled,
    "residual from outside": residual_from_outside,
    "residual without ReLU": lambda: residual_from_outside(False),
    "bare norms": bare_norm_of_a_sum,
    "norms on both sides": norms_on_both_sides,
    "plain products": plain_products,
    "a convolution at the end": grouped,
}


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


def stock_output(call):
    return program_output(call)


def moved(call, dtype, backend="auto"):
    """The call in `dtype`; norms stay in float32 beside 16 bits."""

    def to(t, wide):
        return t if t is None or not t.is_floating_point() else t.to(torch.float32 if wide else dtype)

    tensors = [type(own)(*(to(t, i > 1 and dtype.itemsize == 2) for i, t in enumerate(own))) for own in call.tensors]
    program = dataclasses.replace(call.program, backend=backend)
    return Call(program, call.x.to(dtype), tensors, to(call.residual, False))


def modules_of(call):
    return [nn.Identity() for _ in call.program.nodes]


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


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
    seen, original = [], onednn.conv_packed
    monkeypatch.setattr(onednn, "conv_packed", lambda *args: seen.append(args[6:]) or original(*args))
    for name, in_place in [("identity", False), ("projection", True), ("activated shortcut", False)]:
        seen.clear()
        program, tensors = frozen(*CASES[name]())
        call = moved(Call(program, torch.randn(2, 6, 5, 5, dtype=F64), tensors), torch.float32)
        evaluate(call, modules_of(call))
        assert [added for residual, added in seen if residual is not None] == [in_place]
