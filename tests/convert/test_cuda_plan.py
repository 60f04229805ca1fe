"""A training step on tensors of a GPU: what the plan chooses, which ops run, who takes them and what is launched.

Fake tensors stand for the GPU's: a CUDA build of PyTorch makes them without a GPU, a CPU build cannot. What a driver
would tell is said to be an H100; launches are recorded instead of made. Values are the interpreter's business.
"""

import importlib

import pytest
import torch
from nets import block
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused
from resnet_fused.backends import backends, dispatch, opaque, selfcheck
from resnet_fused.backends import triton as room
from resnet_fused.blocks import devices, plan
from resnet_fused.models import resnet50

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason=f"torch {torch.__version__} makes no tensors of a GPU; install a CUDA build"
)
CHANNELS_LAST = torch.channels_last

#: The ops of a bottleneck with Gram joins, in order; a projection has its own before the join, and first backward.
BEFORE_JOIN = "conv1x1 bn_affine norm_add_relu bn_stats bn_affine gram gram_norm bn_affine"
SHORTCUT = "bn_stats gram gram_norm bn_affine"  # the centre: the mean of a sample
NARROW_BACKWARD = "conv1x1_backward gram_grad"  # both gradients in one pass; the input's is corrected afterwards
AT_3X3 = "bn_coefficients lazy_grad_apply"
BEFORE_3X3 = "norm_add_relu_backward bn_coefficients conv1x1_backward"
JOIN_BACKWARD = f"{NARROW_BACKWARD} conv1x1_dgrad"
IDENTITY = f"{BEFORE_JOIN} conv1x1_join {JOIN_BACKWARD} {AT_3X3} {BEFORE_3X3}"
PROJECTION = (  # the first convolution, which reads x again, adds its correction
    f"{BEFORE_JOIN} {SHORTCUT} conv1x1_join {NARROW_BACKWARD} {JOIN_BACKWARD} {AT_3X3} norm_add_relu {BEFORE_3X3}"
)


class Calls(TorchDispatchMode):
    """Every operation that runs: ours with its arguments, and the names of ATen's."""

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
    declared = room.declare()
    monkeypatch.setattr(dispatch, "_backends", backends() | {"triton": declared})
    monkeypatch.setattr(plan, "_HAS_TRITON", not declared.unavailable)
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
    return [node for node in nodes if node.name() == "FusedChainBackward"]


def step(model, x):
    """The calls of a step under autocast, with every chain's backward."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.dim() == 4:
                module._parameters[name] = nn.Parameter(p.detach().contiguous(memory_format=CHANNELS_LAST))
    x = x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    with Calls() as calls:
        with torch.autocast("cuda", torch.bfloat16):
            out = resnet_fused.fuse(model)(x)
        with torch.no_grad():
            for chain in chains_of(out):
                made = chain._input_metadata[0]
                chain.apply(torch.empty(made.shape, dtype=made.dtype).contiguous(memory_format=CHANNELS_LAST))
    return calls


def metadata(results):
    results = results if isinstance(results, tuple) else (results,)
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
    assert {op for op, _, _ in calls.ours} == set(room.OPS)
    if not torch.cuda.is_available():
        for op, args, kwargs in calls.ours:
            with pytest.raises(RuntimeError, match=f"^{op}: .*\n  triton: cannot be checked: there is no GPU$"):
                dispatch.choose(op, args, kwargs, "triton")
    monkeypatch.setattr(selfcheck, "objection", lambda *args: "")
    for op, args, kwargs in calls.ours:
        chosen, before = dispatch.choose(op, args, kwargs), len(h100)
        assert (chosen.name, args[0].device.type) == ("triton", "cuda")
        made = importlib.import_module(f"{room.__name__}.{op}").run(*args, **kwargs)
        assert len(h100) > before, op
        assert metadata(made) == metadata(chosen.kernels[op].run(*args, **kwargs)), op
