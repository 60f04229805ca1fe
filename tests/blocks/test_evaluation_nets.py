"""Pre-activation networks whose blocks are evaluated as whole programs: stock's values, kept, planned and compiled."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from evaluated import evaluate
from programs import F64
from torch import nn

from resnet_fused.backends import current, use
from resnet_fused.models.preact import PreActBottleneck, PreActResNet
from resnet_fused.plan import choose
from resnet_fused.plan.devices import DEVICES
from resnet_fused.steps import Conv, Norm, StepTensors
from resnet_fused.steps.program import Addition, Call, Convolution, Normalisation, Program

FROZEN = Norm(batch_stats=False)


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


class Whole(nn.Module):
    """A pre-activation block whose forward evaluates it as one program."""

    def __init__(self, block):
        super().__init__()
        self.block, self.parts, nodes = block, [], []
        for norm, conv in ((block.bn1, block.conv1), (block.bn2, block.conv2), (block.bn3, block.conv3)):
            nodes += [Normalisation(len(nodes), FROZEN), self._convolution(len(nodes) + 1, conv)]
            self.parts += [norm, conv]
        branch, other = len(nodes), 0
        if block.downsample is not None:
            nodes.append(self._convolution(1, block.downsample))
            self.parts.append(block.downsample)
            other = len(nodes)
        self.program, self.parts = Program((*nodes, Addition(branch, other))), [*self.parts, None]

    def _convolution(self, source, conv):
        return Convolution(source, Conv(conv.stride, conv.padding, conv.dilation, conv.groups))

    def forward(self, x):
        tensors = []
        for part in self.parts:
            is_conv = isinstance(part, nn.Conv2d)
            own = () if part is None or is_conv else (part.weight, part.bias, part.running_mean, part.running_var)
            weights = (part.weight, part.bias) if is_conv else (None, None)
            tensors.append(StepTensors(*weights, *own))
        program = dataclasses.replace(self.program, backend=current())
        return evaluate(Call(program, x, tensors), self.parts)


def preact_resnet(dtype=torch.float32):
    torch.manual_seed(0)
    model = PreActResNet(PreActBottleneck, [1, 2, 1, 1], num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    whole = copy.deepcopy(model)
    for stage in (whole.layer1, whole.layer2, whole.layer3, whole.layer4):
        for name, block in stage.named_children():
            setattr(stage, name, Whole(block))
    return model.to(dtype), whole.to(dtype)


@torch.no_grad()
def test_a_pre_activation_network_on_a_cpu():
    stock, ours = preact_resnet()
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    exact, theirs = copy.deepcopy(stock).double()(x.double()), stock(x)
    for _ in range(3):
        assert error(ours(x), exact) <= 2 * error(theirs, exact) + 1e-6


@torch.no_grad()
def test_a_pre_activation_network_on_a_gpu():
    stock, ours = preact_resnet(F64)
    x = torch.randn(2, 3, 64, 64, dtype=F64).contiguous(memory_format=torch.channels_last)
    with choose.planning_for(DEVICES["h100"]), use("reference"), choose.observing() as notes:
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-9, atol=1e-9)
    assert len(notes) == 5
    assert all(note.startswith("evaluation: ") and "1x1 convolution with" in note for note in notes)


@torch.no_grad()
@pytest.mark.parametrize("gpu", [False, True])
def test_a_program_is_compiled_in_one_graph(gpu):
    torch.compiler.reset()
    block = preact_resnet()[1].layer2[0]
    x = torch.randn(2, 256, 6, 6).contiguous(memory_format=torch.channels_last)
    with choose.planning_for(DEVICES["h100"]) if gpu else contextlib.nullcontext():
        want = block(x)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)
