"""Compile every launch that the Triton ops make, for GPUs this machine need not have; print one JSON row for each.

Run by test_triton_compile.py in a process of its own, because the interpreter replaces ``triton.jit``. The ops run on
meta tensors with the launch intercepted, so what is compiled is exactly what a GPU would be given.
"""

import concurrent.futures
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resnet_fused.backends.triton import bn_stats, common, lazy_grad_apply, norm_add_relu, norm_add_relu_backward

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ARCHS = (80, 90, 100)


def tensors(dtype, channels, n):
    """Meta tensors of a large layer: z, residual, a [C] vector, an [N] factor, and a packed mask."""
    h, w = 56, 56
    z, r = (torch.empty((n, h, w, channels), dtype=dtype, device="meta").permute(0, 3, 1, 2) for _ in range(2))
    vector, factor = torch.empty(channels, device="meta"), torch.empty(n, device="meta")
    return z, r, vector, factor, torch.empty((n * h * w, (channels + 7) // 8), dtype=torch.uint8, device="meta")


def launches(dtype, channels=256, samples=64):
    """What to compile: (options, weight, call). Weight 2: a kernel's richest options, 1: common ones, 0: the rest."""
    z, r, v, f, bits = tensors(dtype, channels, samples)
    forward, backward, apply = norm_add_relu.run, norm_add_relu_backward.run, lazy_grad_apply.run
    yield "", 2, lambda: bn_stats.run(z)
    yield "plain", 0, lambda: forward(z, v, v)
    yield "residual, mask", 1, lambda: forward(z, v, v, r, emit_mask=True)
    yield "affine residual, factor, mask", 2, lambda: forward(z, v, v, r, v, v, f, emit_mask=True)
    yield "residual, no relu", 0, lambda: forward(z, v, v, r, relu=False)
    yield "recompute", 1, lambda: backward(z, z=r, scale=v, shift=v)
    yield "recompute, sums only", 0, lambda: backward(z, z=r, scale=v, shift=v, emit_grad=False)
    yield "bits", 1, lambda: backward(z, z=r, mask=bits)
    yield "output, no z", 0, lambda: backward(z, mask=r)
    yield "bits, residual, factor", 2, lambda: backward(z, z=r, mask=bits, residual=r, sample_factor=f)
    yield "no relu", 0, lambda: backward(z, z=r, relu=False, emit_grad=False)
    yield "frozen", 0, lambda: apply(z, None, v)
    yield "affine", 1, lambda: apply(z, r, v, v, v)
    yield "affine, sign, factor", 2, lambda: apply(z, r, v, v, v, v, v, f)


def record(call):
    """The kernels that `call` would start: (kernel, positional arguments, meta-parameters)."""
    started = []
    original = common.start
    common.start = lambda kernel, programs, *args, **meta: started.append((kernel, args, meta))
    try:
        call()
    finally:
        common.start = original
    return started


def source(kernel, args, meta):
    """An ASTSource with the types and alignments that a launch with these arguments would specialise on."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | meta
    signature, constants, attrs = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attrs[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            # specialised on the value 1, an integer would become a constant without methods such as `.to`
            assert parameter.do_not_specialize, f"{kernel.fn.__name__}: {name} is not in do_not_specialize"
            signature[name] = "i32" if value < 2**31 else "i64"
    return ASTSource(kernel, signature, constants, attrs)


def widths(ptx, instruction):
    """How often each access width in bits occurs among global loads ("ld") or stores ("st")."""
    found = {}
    for vector, bits in re.findall(rf"{instruction}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)\s", ptx):
        width = int(vector or 1) * int(bits)
        found[width] = found.get(width, 0) + 1
    return found


def resources(cubin):
    """Registers, stack and local memory of a kernel, as the assembler counts them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def compile_one(kernel, args, meta, arch):
    """Compile one launch for one architecture."""
    options = {"num_warps": common.NUM_WARPS, "enable_fp_fusion": common.ENABLE_FP_FUSION}
    built = triton.compile(source(kernel, args, meta), target=GPUTarget("cuda", arch, 32), options=options)
    ptx = built.asm["ptx"]
    return dict(
        resources(built.asm["cubin"]),
        shared=built.metadata.shared,
        loads=widths(ptx, "ld"),
        stores=widths(ptx, "st"),
        float_max=re.findall(r"max\.\S*f32", ptx),
        atomics=len(re.findall(r"\b(?:atom|red)\.global", ptx)),
    )


def chosen():
    """What to compile: (options, dtype, channels, architecture, launch). All options in bfloat16 on sm_90."""
    for dtype in DTYPES:
        for arch in ARCHS:
            least = (dtype is not torch.bfloat16) + (arch != 90)
            for options, weight, call in launches(dtype):
                if weight >= least:
                    yield from ((options, dtype, 256, arch, started) for started in record(call))
    few = ((torch.bfloat16, 24, 64), (torch.float32, 24, 64), (torch.bfloat16, 7, 64), (torch.bfloat16, 8, 2**20))
    for dtype, channels, samples in few:  # the last: 2^31 rows and more
        for options, weight, call in launches(dtype, channels, samples):
            if weight == 2:
                yield from ((options, dtype, channels, 90, started) for started in record(call))


def row_of(what):
    """Compile one of `chosen` and describe it."""
    options, dtype, channels, arch, (kernel, args, meta) = what
    row = {"kernel": kernel.fn.__name__, "options": options, "dtype": str(dtype).removeprefix("torch.")}
    return row | {"channels": channels, "arch": arch} | compile_one(kernel, args, meta, arch)


def main():
    different = {}  # the second stages are the same for most launches
    for what in chosen():
        *_, arch, (kernel, args, meta) = what
        different.setdefault((source(kernel, args, meta).hash(), arch), what)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # half of the time goes to the assembler, a process
        for row in pool.map(row_of, different.values()):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
