"""Take every Triton launch through Triton's own argument binding, up to the compiler, with no GPU.

Run by test_triton_compile.py in a process of its own. A driver that only names its target stands in for CUDA's. Prints,
for each call and each kernel that it starts, how many variants would be compiled: for batches and images of several
sizes ("sizes"), and for layers of several widths besides ("widths").
"""

import importlib
import json
import types

from layer_calls import Layer, calls
from triton import compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from resnet_fused.backends import triton as room
from resnet_fused.backends.triton import common

SIZES = ((4, 8), (1, 1), (3, 5), (64, 9))  # samples, height and width
WIDTHS = ((64, 256), (16, 64), (512, 2048))  # narrow and wide channels


class NamesItsTarget:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def identity(source, target, options, **rest):
    """Instead of Triton's compiler, which a kernel takes from there when it is bound first."""
    return types.SimpleNamespace(hash=source.hash() + repr(options))


def bind(kernel, programs, *args, warps=common.NUM_WARPS, stages=common.NUM_STAGES, registers=None, **meta):
    """An identity of what Triton would compile for this launch."""
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    options["enable_fp_fusion"] = common.ENABLE_FP_FUSION
    return kernel.warmup(*args, **meta, **options, grid=(programs,)).hash


def variants(sizes, widths):
    """{call: {kernel: number of variants}}."""
    found = {}
    for samples, size in sizes:
        for narrow, wide in widths:
            for op, options, args, kwargs in calls(Layer(samples, size, narrow, wide, device="cpu")):
                kernels = found.setdefault(f"{op} ({options})", {})

                def start(kernel, programs, *args, kernels=kernels, **meta):
                    kernels.setdefault(kernel.fn.__name__, set()).add(bind(kernel, programs, *args, **meta))

                common.start = start
                importlib.import_module(f"{room.__name__}.{op}").run(*args, **kwargs)
    return {call: {name: len(hashes) for name, hashes in kernels.items()} for call, kernels in found.items()}


def main():
    driver.set_active(NamesItsTarget())
    compiler.compile = identity
    print(json.dumps({"sizes": variants(SIZES, WIDTHS[:1]), "widths": variants(SIZES[:1], WIDTHS)}))


if __name__ == "__main__":
    main()
