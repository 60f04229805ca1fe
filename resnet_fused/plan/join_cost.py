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

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of a variant beyond what both variants do, and the convolution's own, forward and backward."""

    plain_bytes: int
    gram_bytes: int
    gram_flops: int  # in the dtype of the activations
    small_flops: int  # of the small matrices, in float32
    conv_bytes: int
    conv_flops: int
    dtype: torch.dtype

    def gram_share(self, device: Device) -> float:
        """Time that the Gram join is expected to add, as a share of the convolution's; negative where it is faster."""

        def seconds(moved: int, flops: int = 0, dtype: torch.dtype = self.dtype) -> float:
            arithmetic = flops / (device.compute_share * device.peak(dtype))
            return moved / (device.bandwidth_share * device.bandwidth) + arithmetic

        small = self.small_flops / (device.compute_share * device.single)
        gram = seconds(self.gram_bytes, self.gram_flops) + small
        conv = max(seconds(self.conv_bytes), seconds(0, self.conv_flops))
        return (gram - seconds(self.plain_bytes)) / conv


def cost(pixels: int, inputs: int, outputs: int, dtype: torch.dtype, lazy: bool = False) -> Cost:
    """Costs of the join of a 1x1 convolution from `inputs` to `outputs` channels over `pixels` outputs."""
    size = dtype.itemsize
    return Cost(
        plain_bytes=(6 if lazy else 7) * pixels * outputs * size,
        gram_bytes=(1 if lazy else 4) * pixels * inputs * size,
        gram_flops=pixels * inputs * (inputs + 1) + 2 * pixels * inputs * inputs,
        small_flops=(5 if lazy else 8) * outputs * inputs * inputs,
        conv_bytes=3 * pixels * (inputs + outputs) * size,
        conv_flops=6 * pixels * inputs * outputs,
        dtype=dtype,
    )


def pays(pixels: int, inputs: int, outputs: int, dtype: torch.dtype, lazy: bool, device: Device) -> bool:
    """Whether the plan takes a Gram join for the memory that it saves."""
    return cost(pixels, inputs, outputs, dtype, lazy).gram_share(device) <= (TOLERATED_LAZY if lazy else TOLERATED)
