"""Compile every launch that the Triton ops make, for GPUs this machine need not have; print one JSON row for each.

Run by test_triton_compile.py in a process of its own, because the interpreter replaces ``triton.jit``. The ops run on
meta tensors with the launch intercepted, so what is compiled is exactly what a GPU would be given.
"""

import contextlib
import io
import json
import multiprocessing
import os
import re
import select
import sys

import torch
import triton
from compiled_launches import ALL, chosen
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS |= {torch.uint8: "*u8", torch.int64: "*i64"}


def source(launch):
    """An ASTSource with the types and alignments that this launch would specialise on."""
    signature, constants, attrs = {}, {}, {}
    kernel = launch.kernel
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = launch.values[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attrs[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
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


def resources(said):
    """Registers, bytes of stack and of spills of a kernel, in what the assembler says of it (``ptxas -v``)."""
    (registers,) = re.findall(r"Used (\d+) registers", said)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    stack, *spills = (sum(map(int, each)) for each in zip(*frames, strict=True))
    return {"registers": int(registers), "stack": stack, "spills": sum(spills)}


def compile_one(launch, arch):
    """Compile one launch for one architecture."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        built = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)
    ptx = built.asm["ptx"]
    return dict(
        resources(said.getvalue()),
        shared=built.metadata.shared,
        warps=launch.options["num_warps"],
        loads=widths(ptx, "ld"),
        stores=widths(ptx, "st"),
        copies={8 * int(size, 16): 1 for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, 0x(\w+)[,;]", ptx)},
        products=sorted(set(re.findall(r"\b(wgmma|mma|tcgen05)\.(?:mma_async|sync|mma)", ptx))),
        tf32="tf32" in ptx,
        float_max=re.findall(r"max\.\S*f32", ptx),
        atomics=len(re.findall(r"\b(?:atom|red)\.global", ptx)),
    )


def row_of(what):
    """Compile one of `chosen` and describe it."""
    options, dtype, channels, arch, launch = what
    row = {"kernel": launch.kernel.fn.__name__, "options": options, "dtype": str(dtype).removeprefix("torch.")}
    return row | {"channels": channels, "arch": arch} | compile_one(launch, arch)


def different():
    """What is different among `chosen`: the second stages are the same for most launches.

    sm_80 and sm_120 multiply by the same instruction: of what is the same for both but for the assembler, sm_80's is
    the richest of each kernel and dtype, and sm_120's, where a block has less memory, all.
    """
    found = {}
    for what in chosen():
        *_, arch, launch = what
        found.setdefault((source(launch).hash(), tuple(launch.options.values()), arch), what)
    kept = set()
    for code, options, arch in sorted(found, key=lambda key: -given(found[key][-1])):
        if arch == 80 and (code, options, 120) in found and not ALL:
            _, dtype, *_, launch = found[code, options, arch]
            if (launch.kernel, dtype) in kept:
                del found[code, options, arch]
            kept.add((launch.kernel, dtype))
    return list(found.values())


def given(launch):
    """How many of the kernel's parameters are there."""
    return sum(value is not None for value in launch.values.values())


def main():
    """In a process for each core, as the compiler holds Python's lock half of the time; forked: launches do not pickle.
    Each takes the next one when it is done with its own: of the largest kernels, which take longest, first."""
    triton.knobs.nvidia.dump_ptxas_log = True  # which tells what cuobjdump would, without a process more
    work = sorted(different(), key=lambda what: -len(what[-1].values))
    fork = multiprocessing.get_context("fork")
    taken = fork.Value("i", 0)

    def print_rows():
        while True:
            with taken.get_lock():
                mine = taken.value
                taken.value += 1
            if mine >= len(work):
                return
            line = (json.dumps(row_of(work[mine])) + "\n").encode()
            assert len(line) <= select.PIPE_BUF, "processes write to one pipe: a line must go in whole"
            os.write(sys.stdout.fileno(), line)

    helpers = [fork.Process(target=print_rows) for _ in os.sched_getaffinity(0)]
    for helper in helpers:
        helper.start()
    for helper in helpers:
        helper.join()
    sys.exit(max(abs(helper.exitcode) for helper in helpers))


if __name__ == "__main__":
    main()
