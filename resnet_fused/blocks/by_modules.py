"""A site by calling its modules, one after the other, as its block's forward does."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from ..steps import stock
from ..steps.program import Addition, Averaging, Normalisation
from ..steps.stock import add
from . import drop_paths, norms
from .site import Site


def draw(site: Site, x: Tensor) -> Tensor | None:
    """The factor for each sample of the drop path in `site`, if it has one, in the dtype that its branch has."""
    if site.drop_path is None:
        return None
    casts = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return drop_paths.drawn(site.drop_path, x, torch.get_autocast_dtype(x.device.type) if casts else x.dtype)


def called(site: Site, x: Tensor, residual: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """The output of `site` by calling its modules, as its block's forward does; `factor`: that was drawn already."""
    return computed(site, {0: x, 1: residual}, draw(site, x) if factor is None else factor)[site.shape.program.output]


def computed(
    site: Site, values: dict[int, Tensor], factor: Tensor | None = None, only: Collection[int] | None = None
) -> dict[int, Tensor]:
    """`values` of inputs, and those that the modules of `site` make of them; `only`: none but these."""
    shape, values = site.shape, dict(values)
    for (value, node), module in zip(shape.program.numbered, site.modules, strict=True):
        if only is not None and value not in only:
            continue
        h = values[node.reads[0]]
        if module is not None:
            y = module(h)
        elif isinstance(node, Averaging):
            y = F.avg_pool2d(h, *node.average.args)
        else:
            y = add(node, h, values[node.other], factor, shape.inplace_add)
        activated = isinstance(node, Normalisation) and norms.activation_of(module) is not None
        clamps = isinstance(node, Normalisation | Addition) and node.relu and not activated
        if isinstance(node, Normalisation) and node.act is not None and not activated:
            y = stock.activated(y, node.act, owned=True)
        values[value] = torch.relu_(y) if clamps else y
    return values
