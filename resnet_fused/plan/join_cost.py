"""Plain or Gram join: what the two variants do differently.

Writing z, its passes forward and backward cost bytes; the Gram matrix, its correction of the gradient and the small
matrix products cost FLOPs::

    plain: passes over z beyond the convolutions: write, statistics, normalise; sums, apply (2 reads, 1 write): 7
           lazy: write, normalise; sums (of z and of the gradient); on load in two products: 6
    gram:  M*C*(C+1) + 2*M*C*C for the Gram matrix and the correction, 4 products of [K, C] and [C, C] (lazy: 2.5, as
           only half of the symmetric one is computed),
           1 more read of the input, and an add for the correction's write (lazy: that is an epilogue)

The Gram join also saves the bytes of z between forward and backward, the reason it exists: it is taken unless the model
expects it to be slower by more than :data:`TOLERATED`, or :data:`TOLERATED_LAZY`, of the last convolution's time.
"""

from __future__ import annotations

import torch

from .devices import Device

#: Share of the last convolution's forward and backward time that a Gram join may cost, for the memory it saves. Where
#: the model expected +4% on a CPU with AVX-512 (ResNet-50's layer3.1), the whole block took 7 to 8% longer than with a
#: plain join: benchmarks/results/epyc-avx512-2core/runs.jsonl:5.
TOLERATED = 0.0
#: The same for a lazy chain, on a GPU, whose times are a roofline's with assumed shares: within this much, the variants
#: count as equally fast, and bytes decide. For ResNet-50 in bfloat16 at batch 256 it decides layer4's joins on A100,
#: H200 and B200 (+26%, +8% and +31%): 3.1 MB less moved and 0.6 MB less saved per image, for which `explain` predicts
#: 3 to 6% more for the block and up to 0.9% for the step; and layer4's projection on an RTX 4090 (+18%): 0.8 and 0.2 MB
#: less, 8% more for the block and 0.5% for the step. Nothing of this is measured; `tune` does that.
TOLERATED_LAZY = 1 / 3


def gram_share(pixels: int, inputs: int, outputs: int, dtype: torch.dtype, lazy: bool, device: Device) -> float:
    """Time that the Gram join of a 1x1 convolution is expected to add, as a share of the convolution's own.

    Of that from `inputs` to `outputs` channels over `pixels` outputs, forward and backward; negative: it is faster.
    """
    moved, multiplied = device.bandwidth_share * device.bandwidth, device.compute_share * device.peak(dtype)
    plain = (6 if lazy else 7) * pixels * outputs * dtype.itemsize / moved
    gram = (1 if lazy else 4) * pixels * inputs * dtype.itemsize / moved
    gram += (pixels * inputs * (inputs + 1) + 2 * pixels * inputs * inputs) / multiplied
    gram += (5 if lazy else 8) * outputs * inputs * inputs / (device.compute_share * device.single)  # in float32
    conv = max(3 * pixels * (inputs + outputs) * dtype.itemsize / moved, 6 * pixels * inputs * outputs / multiplied)
    return (gram - plain) / conv
