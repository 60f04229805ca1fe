"""Models as a GPU would evaluate them, on a CPU, and what they would move there."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import resnet_fused
from resnet_fused.models.resnet import BasicBlock, Bottleneck
from resnet_fused.plan import choose
from resnet_fused.plan.devices import DEVICES
from resnet_fused.traffic.count import Counter

#: Whether Triton's kernels have batch norm, sum and ReLU in 1x1 convolutions somewhere, or in passes only.
PRODUCTS, PASSES = True, False


class Plain(nn.Module):
    """One convolution and its batch norm, with what is behind it."""

    def __init__(self, kernel=3, relu=True, bias=False):
        super().__init__()
        self.conv = nn.Conv2d(8, 12, kernel, 1, kernel // 2, bias=bias)
        self.bn, self.act = nn.BatchNorm2d(12), nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def projection(outputs, kernel=1, stride=2):
    return nn.Sequential(nn.Conv2d(8, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs))


def strided_first():
    found = Bottleneck(8, 4, 2, projection(16))
    found.conv1.stride, found.conv2.stride = (2, 2), (1, 1)
    return found


MODELS = {
    "identity bottleneck": (lambda: Bottleneck(8, 2), PRODUCTS),
    "projected bottleneck": (lambda: Bottleneck(8, 4, 2, projection(16)), PRODUCTS),
    "projection of 3x3": (lambda: Bottleneck(8, 4, 2, projection(16, 3)), PRODUCTS),
    "strided first": (strided_first, PRODUCTS),
    "identity basic block": (lambda: BasicBlock(8, 8), PASSES),
    "projected basic block": (lambda: BasicBlock(8, 16, 2, projection(16)), PASSES),
    "one 3x3": (Plain, PASSES),
    "one 3x3 with a bias": (lambda: Plain(bias=True), PASSES),
    "bare 3x3": (lambda: Plain(relu=False), PASSES),
    "one 1x1 with a bias": (lambda: Plain(1, bias=True), PRODUCTS),
    "bare 1x1": (lambda: Plain(1, relu=False), PRODUCTS),
}


def trained(model, dtype=torch.float64):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(t)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.to(dtype, memory_format=torch.channels_last).eval()


def images(dtype=torch.float64, size=10):
    x = torch.randn(3, 8, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def on_gpu(model, x, backend="reference"):
    with torch.no_grad(), choose.observing() as notes, choose.planning_for(DEVICES["h100"]), resnet_fused.use(backend):
        return model(x), notes


def counted(model, x):
    with torch.no_grad(), Counter() as counter:
        model(x)
    return counter.total


def faked(model, size, dtype=torch.bfloat16, norms=torch.float32):
    """The model with fake parameters, and fake images."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            own = norms if isinstance(module, nn.BatchNorm2d) else dtype
            for store in (module._parameters, module._buffers):
                for name, t in store.items():
                    if t is not None:
                        made = mode.from_tensor(t.detach()).to(own if t.is_floating_point() else t.dtype)
                        store[name] = nn.Parameter(made) if store is module._parameters else made
        x = torch.empty(4, 8, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return mode, x
