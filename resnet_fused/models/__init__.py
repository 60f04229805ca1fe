"""Architectures as stock PyTorch modules; pass one to ``resnet_fused.fuse``."""

from .densenet import (
    DenseBlock,
    DenseLayer,
    DenseNet,
    DenseNetCifar,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet_bc100_k12,
    densenet_bc190_k40,
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

__all__ = [
    "BUILDERS",
    "BasicBlock",
    "Bottleneck",
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "DenseNetCifar",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActResNet",
    "PreActResNetCifar",
    "ResNet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet_bc100_k12",
    "densenet_bc190_k40",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet110",
    "preact_resnet152",
    "preact_resnet164",
    "preact_resnet1001",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

#: Builders by name, for command lines and tests; each takes the options of its architecture.
BUILDERS = {
    name: globals()[name]
    for name in sorted(
        __all__, key=lambda name: (name.startswith("preact_"), name.startswith("densenet"))
    )  # messages list what is usual first
    if name[0].islower()
}
