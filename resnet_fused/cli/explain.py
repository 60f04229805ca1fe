"""``explain``: the plan of a model, without running it."""

from __future__ import annotations

import argparse

import torch

import resnet_fused

from ..bench import named

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    model = named.build(options.model)
    edge = named.input_size(model)
    size = options.input or (16, 3, edge, edge)
    explained = resnet_fused.explain(
        model, size, dtype=DTYPES[options.dtype], training=not options.eval, device=options.device
    )
    print(explained)
    return 0
