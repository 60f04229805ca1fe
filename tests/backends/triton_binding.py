"""Take every Triton launch through Triton's own argument binding, up to the launch itself, with no GPU.

Run by test_triton_compile.py in a process of its own. A driver that only names its target stands in for CUDA's. Prints,
for each kernel, how many variants were compiled for layers of several sizes: one for each set of options and no more.
"""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from resnet_fused.backends.triton import bn_stats, common, lazy_grad_apply, norm_add_relu, norm_add_relu_backward


class NamesItsTarget:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main():
    driver.set_active(NamesItsTarget())
    variants = {}

    def compile_only(kernel, programs, *args, **meta):
        options = {"num_warps": common.NUM_WARPS, "enable_fp_fusion": common.ENABLE_FP_FUSION}
        built = kernel.warmup(*args, **meta, **options, grid=(programs,))
        variants.setdefault(kernel.fn.__name__, set()).add(built.hash)

    common.start = compile_only
    for shape in ((2, 64, 8, 8), (1, 64, 1, 1), (3, 192, 5, 7), (16, 1024, 4, 4)):
        z = torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        v, factor = torch.ones(shape[1]), torch.ones(shape[0])
        bn_stats.run(z)
        _, mask = norm_add_relu.run(z, v, v, z, v, v, factor, emit_mask=True)
        norm_add_relu_backward.run(z, z, mask=mask, residual=z, sample_factor=factor)
        lazy_grad_apply.run(z, z, v, v, v, v, v, factor)
    print(json.dumps({name: len(hashes) for name, hashes in variants.items()}))


if __name__ == "__main__":
    main()
