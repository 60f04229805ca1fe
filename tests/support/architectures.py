"""Models for the tests of architectures: on meta, or with numbers of their own everywhere."""

import torch
from torch import nn


def meta(builder, **options):
    with torch.device("meta"):
        return builder(**options)


def scattered(model, seed=0):
    """`model` in float64 with every parameter and statistic at a value of its own."""
    draw = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5, generator=draw)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(0, 0.3, generator=draw)
            elif isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=draw)
    return model


def normal(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
