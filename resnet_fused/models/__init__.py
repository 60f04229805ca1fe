"""Architectures as stock PyTorch modules; pass one to ``resnet_fused.fuse``."""

from .cifar import (
    CifarResNet,
    PaddedShortcut,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    resnet1202,
    resnext29_8x64d,
    resnext29_16x64d,
)
from .plain import (
    CifarPlainNet,
    PlainBlock,
    PlainNet,
    plain18,
    plain20,
    plain32,
    plain34,
    plain44,
    plain56,
)
from .preact import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActResNet,
    PreActResNetCifar,
    preact_resnet50,
    preact_resnet101,
    preact_resnet110,
    preact_resnet152,
    preact_resnet164,
    preact_resnet1001,
)
from .resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .stochastic_depth import (
    StochasticDepth,
)
from .wide import (
    WideBlock,
    WideResNet,
    wrn16_8,
    wrn28_10,
    wrn40_4,
)

__all__ = [
    "BUILDERS",
    "BasicBlock",
    "Bottleneck",
    "CifarPlainNet",
    "CifarResNet",
    "PaddedShortcut",
    "PlainBlock",
    "PlainNet",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActResNet",
    "PreActResNetCifar",
    "ResNet",
    "StochasticDepth",
    "WideBlock",
    "WideResNet",
    "plain18",
    "plain20",
    "plain32",
    "plain34",
    "plain44",
    "plain56",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet110",
    "preact_resnet152",
    "preact_resnet164",
    "preact_resnet1001",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet1202",
    "resnext29_8x64d",
    "resnext29_16x64d",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "wrn16_8",
    "wrn28_10",
    "wrn40_4",
]

#: Builders by name, for command lines and tests; each takes the options of its architecture.
BUILDERS = {
    name: globals()[name]
    for name in sorted(__all__, key=lambda name: not name.startswith(("resnet", "resnext")))  # messages: usual first
    if name[0].islower()
}
