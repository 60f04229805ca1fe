"""Evaluation as on a GPU with the compiled convolution, by the reference on the CPU: values, choices, counts."""

import pytest
import torch
from gpu_evaluated import MODELS, counted, faked, images, on_gpu, trained
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused
from resnet_fused.backends import cuda, cuda_conv, soundness
from resnet_fused.convert import stock_forward
from resnet_fused.models import resnet18, resnet50
from resnet_fused.models.resnet import BasicBlock, Bottleneck
from resnet_fused.plan import choose, lower_evaluation
from resnet_fused.plan.devices import DEVICES

WORD = "compiled convolution"


@pytest.fixture
def without_triton(monkeypatch):
    """Nothing but the compiled convolutions, and the join that a chain launches for a projection, is sound."""
    sound = {*cuda.CONVOLUTIONS, "conv1x1_join"}
    monkeypatch.setattr(soundness, "lacking", lambda ops, *where: next((op for op in ops if op not in sound), ""))


@pytest.mark.parametrize("name", MODELS)
def test_values(monkeypatch, name):
    monkeypatch.setattr(lower_evaluation, "_cost", lambda *args: 0)  # also where another way moves less
    model, x = resnet_fused.fuse(trained(nn.Sequential(MODELS[name][0]()))), images()
    for value in (x[0, 0, 0, 0].item(), torch.nan):
        x[0, 0, 0, 0] = value
        with torch.no_grad(), stock_forward():
            want = model(x)
        got, (note,) = on_gpu(model, x)
        assert WORD in note and "norm on load" not in note
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("size", [16, 56])
@pytest.mark.parametrize("name", MODELS)
def test_never_more_than_stock(without_triton, name, size):
    model = resnet_fused.fuse(trained(nn.Sequential(MODELS[name][0]())))
    mode, x = faked(model, size)
    with mode:
        with stock_forward():
            stock = counted(model, x)
        with choose.planning_for(DEVICES["h100"]):
            ours = counted(model, x)
    assert ours.bytes <= stock.bytes and ours.launches <= stock.launches
    if "bias" not in name:  # of 16 bits, which the kernel does not take
        assert ours.launches < stock.launches
        names = {operation.name for operation in ours.operations}
        assert names <= {"conv_norm_add_relu", "conv_norm_add_relu_", "conv1x1_join"}


@pytest.mark.parametrize(("kind", "megabytes", "launches"), [(resnet50, 55, 52), (resnet18, 14.2, 23)])
def test_whole_models_without_triton(without_triton, kind, megabytes, launches):
    """Each convolution a launch with all that follows it, and the two pools and the last layer by ATen."""
    options = {"dtype": torch.bfloat16, "training": False, "device": "h100"}
    explained = resnet_fused.explain(kind(), (256, 3, 224, 224), **options)
    assert explained.model.fused.bytes <= megabytes * 1e6 * 256
    assert explained.model.fused.launches == launches
    assert all(row.plan.count(WORD) == row.fused.launches for row in explained.blocks)


def plan_of(block, dtype=torch.bfloat16, norms=torch.float32, size=56):
    mode, x = faked(resnet_fused.fuse(trained(block.float(), torch.float32)), size, dtype, norms)
    with mode, torch.no_grad(), choose.planning_for(DEVICES["h100"]), choose.observing() as notes:
        block(x)
    return notes[0]


def test_the_plan_takes_what_moves_less(monkeypatch):
    """No more is written than by Triton's kernels, a projection neither, in fewer launches; but where no chain is."""
    strided = MODELS["projected bottleneck"][0]
    assert WORD in plan_of(nn.Sequential(Bottleneck(8, 2)))
    assert WORD in plan_of(nn.Sequential(BasicBlock(8, 8)))
    assert plan_of(nn.Sequential(strided())).count(WORD) == 3
    monkeypatch.setattr(cuda, "ASSUMED", cuda.ASSUMED - {"conv_chain"})
    soundness.forget()
    assert WORD not in plan_of(nn.Sequential(strided()))
    soundness.forget()


def test_what_the_kernel_does_not_take_goes_another_way():
    assert WORD not in plan_of(nn.Sequential(Bottleneck(8, 2)), norms=torch.bfloat16)  # statistics of 16 bits
    grouped = Bottleneck(8, 2)
    grouped.conv2 = nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False)
    note = plan_of(nn.Sequential(grouped))
    assert "evaluation: " in note and note.count(WORD) < 3


def test_what_has_too_many_elements_goes_another_way(monkeypatch):
    """Where the kernel would refuse the call, and the reference would run it."""
    x = 4 * 8 * 56 * 56
    for most, taken in ((x + 1, True), (x, False)):
        monkeypatch.setattr(cuda_conv, "MOST_ELEMENTS", most)
        note = plan_of(nn.Sequential(Bottleneck(8, 2)))
        assert note.startswith("evaluation: ") and ("in one call" in note) == taken == (note.count(WORD) == 3)


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_is_taken_where_tf32_is_allowed(monkeypatch, allowed):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert (WORD in plan_of(nn.Sequential(Bottleneck(8, 2)), torch.float32)) == allowed


def test_a_cuda_build_of_torch_without_the_library_is_planned_for_without_it(monkeypatch):
    monkeypatch.setattr(cuda, "ASSUMED", frozenset())
    soundness.forget()
    assert WORD not in plan_of(nn.Sequential(Bottleneck(8, 2)))
    soundness.forget()


class Dispatched(TorchDispatchMode):
    """Names of our ops, as they are called."""

    sees_fused_ops = True

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.name().split("::")[1]] if func.namespace == "resnet_fused_auto" else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", ["identity bottleneck", "identity basic block", "projected basic block", "projected bottleneck"]
)
def test_a_block_is_one_call(name):
    """Counted as the convolutions that it starts: before a 1x1 a projection is part of its launch."""
    model = resnet_fused.fuse(trained(nn.Sequential(MODELS[name][0]()).float(), torch.float32))
    mode, x = faked(model, 56)
    with mode, torch.no_grad(), choose.planning_for(DEVICES["h100"]), choose.observing() as notes:
        with Dispatched() as seen:
            model(x)
        convolutions = notes[0].count(WORD)
        assert seen.names == ["conv_chain"] and notes[0].endswith("; in one call")
        total = counted(model, x)
        assert total.launches == convolutions > 1
        joins = {"conv1x1_join"} if name == "projected bottleneck" else set()
        assert {operation.name for operation in total.operations} == {"conv_norm_add_relu", *joins}


def test_without_a_sound_chain_each_convolution_is_called(monkeypatch):
    def lacking(ops, *where):
        return next((op for op in ops if op not in cuda.CONVOLUTIONS or op == "conv_chain"), "")

    monkeypatch.setattr(soundness, "lacking", lacking)
    assert plan_of(nn.Sequential(BasicBlock(8, 8))).count(WORD) == 2
    assert "one call" not in plan_of(nn.Sequential(BasicBlock(8, 8)))


def test_a_chain_is_compiled_in_one_graph():
    torch.compiler.reset()
    model, x = resnet_fused.fuse(trained(MODELS["identity basic block"][0]())), images()
    want, (note,) = on_gpu(model, x)
    assert note.endswith("; in one call")
    with torch.no_grad(), choose.planning_for(DEVICES["h100"]), resnet_fused.use("reference"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(compiled(x), want, rtol=1e-10, atol=1e-10)
