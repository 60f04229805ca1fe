"""A training step on tensors of a GPU: what the plan chooses, which ops run, who takes them and what is launched.

Fake tensors stand for the GPU's: a CUDA build of PyTorch makes them without a GPU, a CPU build cannot. What a driver
would tell is said to be an H100; launches are recorded instead of made. Values are the interpreter's business.
"""

import importlib
import itertools

import pytest
import torch
from nets import block
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused
from resnet_fused.backends import Backend, backends, dispatch, opaque
from resnet_fused.backends import triton as room
from resnet_fused.backends.selfcheck import judge
from resnet_fused.models import resnet18, resnet50
from resnet_fused.models.resnet import BasicBlock, Bottleneck
from resnet_fused.ops import DATA_DTYPES
from resnet_fused.plan import choose, devices

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason=f"torch {torch.__version__} makes no tensors of a GPU; install a CUDA build"
)
CHANNELS_LAST = torch.channels_last

#: The ops of a bottleneck with Gram joins, in order; a projection has its own before the join, and first backward.
BEFORE_JOIN = "conv1x1 norm_add_relu bn_stats gram gram_norm"
SHORTCUT = "bn_stats gram gram_norm"  # the centre: the mean of a sample
NARROW_BACKWARD = "conv1x1_backward gram_grad"  # both gradients in one pass; the input's is corrected afterwards
AT_3X3 = "lazy_grad_apply"
BEFORE_3X3 = "norm_relu_coefficients conv1x1_backward"
JOIN_BACKWARD = f"{NARROW_BACKWARD} conv1x1_dgrad"
IDENTITY = f"{BEFORE_JOIN} conv1x1_join running_update {JOIN_BACKWARD} {AT_3X3} {BEFORE_3X3}"
PROJECTION = (  # the first convolution, which reads x again, adds its correction
    f"{BEFORE_JOIN} {SHORTCUT} conv1x1_join running_update {NARROW_BACKWARD} {JOIN_BACKWARD} {AT_3X3} norm_add_relu "
    f"{BEFORE_3X3}"
)


class Calls(TorchDispatchMode):
    """Every operation that runs: ours with its arguments, and the names of ATen's."""

    sees_fused_ops = True

    def __init__(self):
        super().__init__()
        self.ours, self.others = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func.namespace == opaque.NAMESPACE:
            self.ours.append((func._opname, args, {k: v for k, v in kwargs.items() if k != "backend"}))
        else:
            self.others.add(func._opname)
        return func(*args, **kwargs)


@pytest.fixture
def h100(monkeypatch):
    """Everything as it is where the driver knows one H100; the kernels in the order they are launched."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: devices.DEVICES["h100"].reported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    devices._gpus.clear()
    declared, nothing = room.declare(), Backend("cuda", ("cuda",), {}, "built or not, here Triton serves")
    monkeypatch.setattr(dispatch, "_backends", backends() | {"triton": declared, "cuda": nothing})
    monkeypatch.setattr(choose, "_HAS_TRITON", not declared.unavailable)
    launched = []
    common = importlib.import_module(f"{room.__name__}.common")
    monkeypatch.setattr(common, "start", lambda kernel, *args, **meta: launched.append(kernel.fn.__name__))
    with FakeTensorMode(), torch.device("cuda"):
        yield launched
    devices._gpus.clear()


def chains_of(out):
    """The fused chains behind `out`, the last first. Autograd's own engine would ask the driver for streams."""
    nodes = [out.grad_fn]
    for node in nodes:
        nodes += [n for n, _ in node.next_functions if n is not None and n not in nodes]
    return [node for node in nodes if node.name() == "FusedProgramBackward"]


def laid_out(model, dtype=None):
    """`model` in channels_last, and in `dtype` throughout; ``Module.to`` cannot do that to fake tensors."""

    def made(t):
        t = t.detach().contiguous(memory_format=CHANNELS_LAST) if t.dim() == 4 else t.detach()
        return t.to(dtype) if t.is_floating_point() else t

    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(made(p))
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else made(b)
    return model


def step(model, x):
    """The calls of a step under autocast, with every chain's backward."""
    model, x = laid_out(model), x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    with Calls() as calls:
        with torch.autocast("cuda", torch.bfloat16):
            out = resnet_fused.fuse(model)(x)
        with torch.no_grad():
            for chain in chains_of(out):
                made = chain._input_metadata[0]
                chain.apply(torch.empty(made.shape, dtype=made.dtype).contiguous(memory_format=CHANNELS_LAST))
    return calls


def evaluation(model, x, dtype=None):
    """The calls of an evaluation under autocast, or of a model that is `dtype` throughout."""
    model, x = resnet_fused.fuse(laid_out(model, dtype)).eval(), x.to(dtype).contiguous(memory_format=CHANNELS_LAST)
    with Calls() as calls, torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=dtype is None):
        model(x)
    return calls


def metadata(results):
    results = results if isinstance(results, tuple) else () if results is None else (results,)
    return [(t.shape, t.stride(), t.dtype, t.device) for t in results]


@pytest.mark.parametrize(("inputs", "program"), [(64, PROJECTION), (256, IDENTITY)], ids=["projection", "identity"])
def test_a_bottleneck_runs_on_values(h100, inputs, program):
    """Of ATen's operations on activations only the 3x3 convolution is left, whose input the wider block keeps."""
    calls = step(block(inputs, 64), torch.empty(64, inputs, 56, 56, dtype=torch.bfloat16))
    assert [op for op, _, _ in calls.ours] == program.split()
    assert {"convolution", "convolution_backward"} <= calls.others
    assert not any(word in name for name in calls.others for word in ("norm", "relu", "threshold"))
    assert not calls.others & {"add", "add_", "mul", "sum", "addmm", "bmm"}


def test_triton_takes_every_op_of_resnet50(h100, monkeypatch):
    calls = step(resnet50(), torch.empty(64, 3, 224, 224))
    calls.ours += evaluation(resnet50(), torch.empty(64, 3, 224, 224)).ours
    assert {op for op, _, _ in calls.ours} == set(room.OPS) - {"bn_affine"}  # which other ops do as they merge
    if not torch.cuda.is_available():
        for op, args, kwargs in calls.ours:
            with pytest.raises(RuntimeError, match=f"^{op}: .*\n  triton: cannot be checked: there is no GPU$"):
                dispatch.choose(op, args, kwargs, "triton")
    monkeypatch.setattr(judge, "doubt", lambda *args: "")
    for op, args, kwargs in calls.ours:
        chosen, before = dispatch.choose(op, args, kwargs), len(h100)
        assert (chosen.name, args[0].device.type) == ("triton", "cuda")
        made = importlib.import_module(f"{room.__name__}.{op}").run(*args, **kwargs)
        assert len(h100) > before, op
        assert metadata(made) == metadata(chosen.kernels[op].run(*args, **kwargs)), op


EVALUATED = "running_affine conv1x1_join running_affine running_affine"  # 1x1, 3x3 raw, 1x1 with all that follows


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inputs", [64, 256])
def test_a_bottleneck_is_evaluated_on_values(h100, inputs, dtype):
    calls = evaluation(block(inputs, 64), torch.empty(64, inputs, 56, 56, dtype=torch.bfloat16), dtype)
    projection = ["running_affine"] if inputs == 64 else []
    assert sorted(op for op, _, _ in calls.ours) == sorted([*EVALUATED.split(), "conv1x1_join", *projection])
    assert calls.others <= {
        "device",
        "convolution",
        "_to_copy",
        "detach",
        "clone",
        "empty_strided",
        "empty",
        "as_strided",
    }


def stem():
    """A ResNet of one basic block: what is before it, and what is behind."""
    model = resnet18(num_classes=4)
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.layer1, model.fc = model.layer1[:1], nn.Linear(64, 4)
    return model


@pytest.fixture
def fails(h100):
    """Notes that all kernels of these ops failed their self-check, in every dtype."""

    def note(*ops):
        for question in itertools.product(("triton", "cuda"), ops, DATA_DTYPES, (torch.device("cuda", 0),)):
            judge._known[(*question, judge.ANY)] = "failed its self-check"

    yield note
    judge.forget()


@pytest.mark.parametrize("kind", ["bottleneck", "projected bottleneck", "basic block", "stem"])
@pytest.mark.parametrize("op", room.OPS)
def test_no_op_is_left_to_the_reference(fails, op, kind):
    fails(op)
    inputs = {"bottleneck": 256}.get(kind, 64)
    x = torch.empty(16, inputs, 56, 56, dtype=torch.bfloat16)
    for run in (step, evaluation):
        if kind == "stem":
            model, x = stem(), torch.empty(16, 3, 64, 64)
        else:
            model = block(inputs, 64, kind=BasicBlock if kind == "basic block" else Bottleneck)
        assert {called for called, _, _ in run(model, x).ours} <= set(room.OPS) - {op}


def test_with_no_kernel_at_all_everything_is_stock(fails):
    """A Triton that imports and cannot compile."""
    fails(*room.OPS)
    for run in (step, evaluation):
        calls = run(resnet50(), torch.empty(16, 3, 64, 64))
        assert not calls.ours and any("batch_norm" in name for name in calls.others)


def test_a_pre_activation_block_is_a_program_on_values(h100):
    """1x1 convolutions on values, the 3x3 on a tensor, and the identity path's gradient in the pass that writes."""
    from resnet_fused.models.preact import PreActBottleneck

    x = torch.empty(8, 256, 56, 56, dtype=torch.bfloat16)
    calls = step(PreActBottleneck(256, 64), x)
    forward = "bn_stats conv1x1 norm_add_relu bn_stats conv1x1_join running_update"
    last = "conv1x1_backward lazy_grad_apply"
    inner = "norm_add_relu norm_relu_coefficients conv1x1_backward"
    assert [op for op, *_ in calls.ours] == f"{forward} {last} {inner} lazy_grad_apply".split()
    assert calls.ours[-1][1][-1] is not None  # the residual
