"""Evaluation as on a GPU by Triton's kernels, run by the reference: stock's values and never more, in every form."""

import copy

import pytest
import torch
from gpu_evaluated import MODELS, PASSES, PRODUCTS, counted, faked, images, on_gpu, trained
from torch import nn
from tuned import unsound

import resnet_fused
from resnet_fused.convert import stock_forward
from resnet_fused.ops import running_affine
from resnet_fused.plan import choose, lower_evaluation
from resnet_fused.plan.devices import DEVICES


def form_of(note):
    """What a note says of it."""
    assert note.startswith("evaluation: ")
    return "1x1 convolution" in note


@pytest.fixture(autouse=True)
def without_the_compiled_library(monkeypatch):
    """Whose way is in test_compiled_inference.py."""
    monkeypatch.setattr(lower_evaluation, "_compiled", lambda *args: None)


@pytest.fixture(params=MODELS)
def case(request):
    make, form = MODELS[request.param]
    return resnet_fused.fuse(trained(nn.Sequential(make()))), form


def test_values(case):
    model, form = case
    x = images()
    with torch.no_grad(), stock_forward():
        want = model(x)
    got, notes = on_gpu(model, x)
    assert list(map(form_of, notes)) == [form]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    x[0, 0, 0, 0] = torch.nan
    with torch.no_grad(), stock_forward():
        want = model(x)
    torch.testing.assert_close(on_gpu(model, x)[0], want, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("lacks", ["conv1x1_join", "norm_add_relu", "running_affine"])
def test_without_a_kernel(monkeypatch, case, lacks):
    model, form = case
    x = images(torch.float32)
    model = model.float()
    with torch.no_grad(), stock_forward():
        want = model(x)
    unsound(monkeypatch, lacks)
    got, (note,) = on_gpu(model, x, "auto")
    lacking = f" (no sound kernel of {lacks})"
    if lacks == "conv1x1_join":
        assert form_of(note) == PASSES and note.endswith(lacking) == (form == PRODUCTS)
    elif lacks == "running_affine":
        assert note == "stock" + lacking
    else:
        assert note == "stock" + lacking or form_of(note) == form
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_neither_cached_nor_written(case):
    """Writes that move no version counter are seen at the next call; the parameters stay as they are."""
    model, _ = case
    x, other = images(), copy.deepcopy(model)
    first, _ = on_gpu(model, x)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert torch.equal(on_gpu(model, x)[0], first)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for p in (*model.parameters(), *model.buffers()):
        if p.is_floating_point():
            p.data.mul_(1.5)
    other.load_state_dict(model.state_dict())
    again, _ = on_gpu(model, x)
    assert not torch.equal(again, first)
    assert torch.equal(again, on_gpu(other, x)[0])


@pytest.mark.parametrize("lacks", ["", "conv1x1_join", "norm_add_relu"])
@pytest.mark.parametrize("size", [16, 56])
def test_never_more_than_stock(monkeypatch, case, lacks, size):
    model, _ = case
    mode, x = faked(model, size)
    unsound(monkeypatch, lacks)
    with mode:
        with stock_forward():
            stock = counted(model, x)
        with choose.planning_for(DEVICES["h100"]):
            ours = counted(model, x)
    assert ours.bytes <= stock.bytes and ours.launches <= stock.launches
    names = {operation.name for operation in ours.operations}
    assert lacks not in names and "conv_add_relu" not in names


def test_a_stem_is_pooled_in_the_pass_that_normalises():
    model = trained(resnet_fused.models.resnet18(num_classes=4).float(), torch.float32)
    fused = resnet_fused.fuse(copy.deepcopy(model)).eval()
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    got, notes = on_gpu(fused, x)
    with torch.no_grad():
        want = model(x)
    assert not any(map(form_of, notes))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["projected bottleneck", "projected basic block"])
def test_compiled_in_one_graph(name, dynamic):
    torch.compiler.reset()
    model, x = resnet_fused.fuse(trained(MODELS[name][0]())), images()
    with torch.no_grad(), choose.planning_for(DEVICES["h100"]):
        want = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(x), want, rtol=1e-10, atol=1e-10)


def test_half_precision_statistics_are_widened():
    """A model in 16-bit throughout keeps its running statistics in 16-bit."""
    mean, var = torch.randn(5).bfloat16(), torch.rand(5).bfloat16() + 0.5
    narrow = running_affine.reference(mean, var, mean, var, None, 1e-5)
    wide = running_affine.reference(mean.float(), var.float(), mean.float(), var.float(), None, 1e-5)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_a_cpu_keeps_its_own_way():
    assert not choose.on_gpu(images())


def test_the_functional_step_takes_the_same_way_without_gradients():
    torch.manual_seed(0)
    x, weight, residual = images(), torch.randn(8, 8, 1, 1, dtype=torch.float64), images()
    mean, var = torch.randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.5

    def step():
        return resnet_fused.conv_bn_add_relu(x, weight, mean, var, residual=residual)

    want = step()
    with choose.planning_for(DEVICES["h100"]), resnet_fused.use("reference"), choose.observing() as notes:
        got = step()
        weight.requires_grad_()
        assert step().requires_grad  # as one autograd node
    assert form_of(notes[0]) == PRODUCTS and not notes[1].startswith("evaluation")
    weight, x = weight.detach(), x.contiguous()
    with choose.planning_for(DEVICES["h100"]), resnet_fused.use("reference"):
        assert step().is_contiguous()  # as stock's, and as on a CPU
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
