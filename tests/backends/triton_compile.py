"""Compile every launch that the Triton ops make, for GPUs this machine need not have; print one JSON row for each.

Run by test_triton_compile.py in a process of its own, because the interpreter replaces ``triton.jit``. The ops run on
meta tensors with the launch intercepted, so what is compiled is exactly what a GPU would be given.
"""

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


def tensors(dtype, channels=256):
    """Meta tensors of a large layer: z, residual, a [C] vector, an [N] factor, and a packed mask."""
    n, h, w = 64, 56, 56
    z, r = (torch.empty((n, h, w, channels), dtype=dtype, device="meta").permute(0, 3, 1, 2) for _ in range(2))
    vector, factor = torch.empty(channels, device="meta"), torch.empty(n, device="meta")
    return z, r, vector, factor, torch.empty((n * h * w, (channels + 7) // 8), dtype=torch.uint8, device="meta")


def launches(dtype, channels=256):
    """What to compile: (options, main, call). The main ones are compiled for every dtype and architecture."""
    z, r, v, f, bits = tensors(dtype, channels)
    forward, backward, apply = norm_add_relu.run, norm_add_relu_backward.run, lazy_grad_apply.run
    yield "", True, lambda: bn_stats.run(z)
    yield "plain", False, lambda: forward(z, v, v)
    yield "residual mask", True, lambda: forward(z, v, v, r, emit_mask=True)
    yield "affine residual, factor, mask", True, lambda: forward(z, v, v, r, v, v, f, emit_mask=True)
    yield "residual, no relu", False, lambda: forward(z, v, v, r, relu=False)
    yield "recompute", True, lambda: backward(z, z=r, scale=v, shift=v)
    yield "recompute, sums only", False, lambda: backward(z, z=r, scale=v, shift=v, emit_grad=False)
    yield "bits", True, lambda: backward(z, z=r, mask=bits)
    yield "output, no z", False, lambda: backward(z, mask=r)
    yield "bits, residual, factor", True, lambda: backward(z, z=r, mask=bits, residual=r, sample_factor=f)
    yield "no relu", False, lambda: backward(z, z=r, relu=False, emit_grad=False)
    yield "frozen", False, lambda: apply(z, None, v)
    yield "affine", False, lambda: apply(z, r, v, v, v)
    yield "affine, sign, factor", True, lambda: apply(z, r, v, v, v, v, v, f)


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
            signature[name] = "i32"
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
    """What to compile: (options, dtype, channels, architecture, launch)."""
    for dtype in DTYPES:
        for options, main_case, call in launches(dtype):
            for arch in ARCHS if main_case else (90,):
                if main_case or dtype is torch.bfloat16:
                    yield from ((options, dtype, 256, arch, launch) for launch in record(call))
    for dtype, channels in ((torch.bfloat16, 24), (torch.float32, 24), (torch.bfloat16, 7)):
        for options, main_case, call in launches(dtype, channels):
            if main_case:
                yield from ((options, dtype, channels, 90, launch) for launch in record(call))


def main():
    seen = set()
    for options, dtype, channels, arch, (kernel, args, meta) in chosen():
        identity = (source(kernel, args, meta).hash(), arch)
        if identity in seen:  # the second stages are the same for most launches
            continue
        seen.add(identity)
        what = {
            "kernel": kernel.fn.__name__,
            "options": options,
            "dtype": str(dtype).removeprefix("torch."),
            "channels": channels,
            "arch": arch,
        }
        print(json.dumps(what | compile_one(kernel, args, meta, arch)), flush=True)


if __name__ == "__main__":
    main()
