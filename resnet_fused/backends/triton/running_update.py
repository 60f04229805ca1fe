"""`running_update` in Triton: one launch for all norms, one channel a thread.

Bytes: 24 a channel; of a block of ResNet-50 with 2048 + 2 * 512 channels 74 kB, 22 ns of an H100's bandwidth. What
counts is the launch, which stands for four of PyTorch's ``_foreach``. Not measured on hardware.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops import running_update as op
from ...ops.contract import Tensor
from . import checks, common

BLOCK_C = 128


@triton.jit
def move(
    running_mean_ptr, running_var_ptr, counter_ptr,  # [C], [C], [] or None
    mean_ptr, var_ptr,  # [C]
    factor, momentum, kept, C, tile,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of one norm."""
    cols = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    mean = tl.load(mean_ptr + cols, mask=in_cols, other=0.0)
    var = tl.load(var_ptr + cols, mask=in_cols, other=0.0) * factor
    running_mean = tl.load(running_mean_ptr + cols, mask=in_cols, other=0.0) * kept
    running_var = tl.load(running_var_ptr + cols, mask=in_cols, other=0.0) * kept
    tl.store(running_mean_ptr + cols, tl.fma(mean, momentum, running_mean), mask=in_cols)
    tl.store(running_var_ptr + cols, tl.fma(var, momentum, running_var), mask=in_cols)
    if counter_ptr is not None:
        tl.store(counter_ptr, tl.load(counter_ptr) + 1, mask=tile == 0)


@triton.jit(do_not_specialize=["C0", "C1", "C2", "C3"])
def running_update_kernel(
    running_mean0_ptr, running_var0_ptr, counter0_ptr, mean0_ptr, var0_ptr,
    running_mean1_ptr, running_var1_ptr, counter1_ptr, mean1_ptr, var1_ptr,
    running_mean2_ptr, running_var2_ptr, counter2_ptr, mean2_ptr, var2_ptr,
    running_mean3_ptr, running_var3_ptr, counter3_ptr, mean3_ptr, var3_ptr,  # None: no such norm
    C0, C1, C2, C3,
    factor0, factor1, factor2, factor3, momentum, kept,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    end1 = tl.cdiv(C0, BLOCK_C)
    end2 = end1 + tl.cdiv(C1, BLOCK_C)
    end3 = end2 + tl.cdiv(C2, BLOCK_C)
    if tile < end1:
        move(running_mean0_ptr, running_var0_ptr, counter0_ptr, mean0_ptr, var0_ptr,
             factor0, momentum, kept, C0, tile, BLOCK_C)  # fmt: skip
    elif tile < end2:
        if running_mean1_ptr is not None:
            move(running_mean1_ptr, running_var1_ptr, counter1_ptr, mean1_ptr, var1_ptr,
                 factor1, momentum, kept, C1, tile - end1, BLOCK_C)  # fmt: skip
    elif tile < end3:
        if running_mean2_ptr is not None:
            move(running_mean2_ptr, running_var2_ptr, counter2_ptr, mean2_ptr, var2_ptr,
                 factor2, momentum, kept, C2, tile - end2, BLOCK_C)  # fmt: skip
    else:
        if running_mean3_ptr is not None:
            move(running_mean3_ptr, running_var3_ptr, counter3_ptr, mean3_ptr, var3_ptr,
                 factor3, momentum, kept, C3, tile - end3, BLOCK_C)  # fmt: skip


def check(updates: list[op.Update]) -> None:
    """Raise RuntimeError on arguments that do not fit."""
    for update in updates:
        vectors = update._asdict()
        counter = vectors.pop("counter")
        checks.vectors("running_update", {name: t for name, t in vectors.items() if isinstance(t, Tensor)})
        if update.running_mean.device != updates[0].running_mean.device:
            checks.fail("running_update", "norms are on several devices; pass those of one")
        if counter is None:
            continue
        if counter.dtype != torch.int64 or counter.dim() or counter.device != update.running_mean.device:
            checks.fail("running_update", f"counter is {counter.dtype} of shape {list(counter.shape)} on "
                                          f"{counter.device}; pass an int64 scalar beside its norm")  # fmt: skip


def run(*args, **kwargs) -> None:
    """See :mod:`resnet_fused.ops.running_update`. Raises RuntimeError on arguments that do not fit."""
    updates, momentum = op.split(args, kwargs)
    check(updates)
    missing = op.NORMS - len(updates)
    tensors = [t for u in updates for t in (u.running_mean, u.running_var, u.counter, u.mean, u.var)]
    channels = [*(u.mean.shape[0] for u in updates), *[0] * missing]
    factors = [*(u.factor for u in updates), *[1.0] * missing]
    programs = sum(common.cdiv(c, BLOCK_C) for c in channels)
    if programs:
        rest = (*[None] * (5 * missing), *channels, *factors, momentum, 1 - momentum)
        common.start(running_update_kernel, programs, *tensors, *rest, BLOCK_C=BLOCK_C)


KERNEL = common.register(op.OP, run)
