"""Compile the CUDA kernels with nvcc, alone and without torch: no spills, few registers, 16-byte accesses."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import build_support

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("80", "90", "100")
#: Registers per thread. A block has 256 threads: at 80 three fit an SM of 65536 registers, at 128 two.
REGISTERS = {
    "bn_affine": 80,
    "bn_coefficients": 80,
    "bn_stats": 80,
    "conv1x1": 128,
    "conv1x1_dgrad": 128,
    "conv1x1_join": 128,
    "conv1x1_wgrad": 128,
    "conv_norm_add_relu": 128,
    "gram": 128,
    "gram_grad": 128,
    "gram_norm": 128,
    "lazy_grad_apply": 128,
    "norm_add_relu": 80,
    "norm_add_relu_backward": 128,
    "norm_relu_pool": 128,
    "norm_relu_pool_apply": 128,
    "norm_relu_pool_backward": 128,
}
KERNELS = {
    "bn_affine": 1,
    "bn_coefficients": 1,
    "bn_stats": 3 * 2 + 1,
    "conv1x1": 2 * (2 * 3 + 1) + (2 * 2 + 1) + 1,  # plain or lazy where chunks are copied; and the merge
    "conv1x1_dgrad": 2 * 3 + 2 + 1,  # and the sums
    "conv1x1_join": 3 * (2 * 2 + 1 + 2 + 1),  # so too of one product and of two
    "conv1x1_wgrad": 2 * 4 + 3 + 3,  # and what adds splits
    "conv_norm_add_relu": 2 * 4 + 3,
    "gram": 3 * 2 + 2,  # and the merge of few splits or many
    "gram_grad": 3,
    "gram_norm": 3,
    "lazy_grad_apply": 3 * 2 * 4,
    "norm_add_relu": 3 * 2 * 3,
    "norm_add_relu_backward": 3 * 2 * 4 + 2,
    "norm_relu_pool": 3 * 2 * 2,
    "norm_relu_pool_apply": 3 * 2 * 2,
    "norm_relu_pool_backward": 3 * 2 + 1,
}
#: Of vectors alone: no function for each dtype of activations.
VECTORS = ("bn_affine", "bn_coefficients")
#: On small matrices, far below their limit of registers: one architecture is enough.
SMALL = ("gram_grad", "gram_norm")
CONVOLUTIONS = ("conv_norm_add_relu", "conv1x1", "conv1x1_join")
GRADIENTS = ("conv1x1_dgrad", "conv1x1_wgrad")
#: Passes over activations: kernels that access 16 bytes at a time, and whether they write activations.
PASSES = {
    "bn_stats": (3, False),
    "lazy_grad_apply": (12, True),
    "norm_add_relu": (9, True),
    "norm_add_relu_backward": (12, True),
    "norm_relu_pool": (6, True),
    "norm_relu_pool_apply": (6, True),
    "norm_relu_pool_backward": (3, False),
}
TYPES = ("float", "__half", "__nv_bfloat16")
#: The products of each dtype on tensor cores, by its name in a kernel's.
PRODUCTS = {"f": "m16n8k8.*tf32.tf32", "6__half": "m16n8k16.*f16.f16", "13__nv_bfloat16": "m16n8k16.*bf16.bf16"}


def nvcc() -> str:
    found = build_support.find_nvcc()
    if found is None:
        pytest.skip("needs nvcc")
    return found


def instantiation(op: str) -> str:
    """A source that compiles every kernel of `op`, with nothing but its own header."""
    params = "".join(part.capitalize() for part in op.split("_")) + "Params"
    lines = [f'#include "csrc/cuda/kernels/{op}.cuh"', "namespace resnet_fused::cuda {"]
    if op in VECTORS:
        lines += [f"void launch(const {params}& p, cudaStream_t stream) {{ launch_{op}(p, stream); }}"]
    else:
        lines += [f"template void launch_{op}<{t}>(const {params}&, cudaStream_t);" for t in TYPES]
    return "\n".join([*lines, "}"])


def compile_kernels(op: str, directory: Path, *flags: str) -> tuple[Path, str]:
    source, output = directory / f"{op}.cu", directory / f"{op}.out"
    source.write_text(instantiation(op))
    command = [nvcc(), "-std=c++20", "-O3", f"-I{ROOT}", *flags, str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output, result.stdout + result.stderr


def resources(log: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, architecture) -> (registers, spilled bytes), from the report of ``-Xptxas -v``."""
    found, kernel = {}, None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernel, spilled = match.groups(), 0
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = sum(map(int, match.groups()))
        elif match := re.search(r"Used (\d+) registers", line):
            found[kernel] = (int(match.group(1)), spilled)
    return found


def check_gradients(op: str, ptx: str) -> None:
    """Each product has its dtype's instruction, columns of 16 bits come by transposing ldmatrix; no atomics."""
    found = re.split(r"\.visible \.entry ", ptx)[1:]
    kernels = [kernel for kernel in found if re.match(rf"\w*{op}_kernelI", kernel)]
    assert len(found) == KERNELS[op] and len(kernels) == {"conv1x1_dgrad": 8, "conv1x1_wgrad": 11}[op]
    for kernel in kernels:
        dtype, vectors = re.match(rf"\w*{op}_kernelI(\w+?)NS0_9TileShape\w+?ELb([01])E", kernel).groups()
        assert re.search(f"mma.sync.aligned.{PRODUCTS[dtype]}", kernel)
        assert ("ldmatrix.sync.aligned.m8n8.x4.trans" in kernel) == (dtype != "f")
        assert vectors == "0" or re.search(r"ld\.global\S*\.v4", kernel)
    assert not any(re.search(r"\b(atom|red)\.", kernel) for kernel in found)


@pytest.mark.parametrize("op", REGISTERS)
def test_registers_and_spills(op, tmp_path):
    architectures = ARCHITECTURES[1:2] if op in SMALL else ARCHITECTURES
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    kept = ["--keep", f"--keep-dir={tmp_path}"] if op in GRADIENTS else []  # PTX too: compiling takes long
    _, log = compile_kernels(op, tmp_path, "-Xptxas=-v", "-c", *gencode, *kept)
    used = resources(log)
    assert {architecture for _, architecture in used} == set(architectures)
    assert len(used) == KERNELS[op] * len(architectures), sorted(used)
    print(f"{op}: at most {max(r for r, _ in used.values())} registers")
    assert {k: v for k, v in used.items() if v[0] > REGISTERS[op] or v[1]} == {}
    assert "warning" not in log
    if op in GRADIENTS:
        (ptx,) = tmp_path.glob("*compute_80*.ptx")
        check_gradients(op, ptx.read_text())


@pytest.mark.parametrize("op", CONVOLUTIONS[:2])
def test_smallest_tiles_leave_room_for_a_third_block(op, tmp_path):
    """Of a convolution: 64x64 outputs a block, for layers of few pixels; and its shared memory."""
    _, log = compile_kernels(op, tmp_path, "-Xptxas=-v", "-c", "-arch=sm_90")
    used = {kernel: registers for (kernel, _), (registers, _) in resources(log).items() if "Li64ELi64E" in kernel}
    assert len(used) == {"conv_norm_add_relu": 3, "conv1x1": 6}[op] and max(used.values()) <= 80
    source, name = tmp_path / "bytes.cu", "conv" if op == "conv_norm_add_relu" else op
    lines = [
        f"static_assert({name}_shared_bytes<TileShape<{rows}, {cols}>>() <= {kilobytes} * 1024);"
        for rows, cols, kilobytes in ((128, 128, 99), (128, 64, 81), (64, 64, 53))  # one, two and three of 164 KB
    ]
    text = [f'#include "csrc/cuda/kernels/{op}.cuh"', "namespace resnet_fused::cuda {", *lines, "}"]
    source.write_text("\n".join(text))
    command = [nvcc(), "-std=c++20", f"-I{ROOT}", "-c", "-arch=sm_80", str(source), "-o", str(tmp_path / "bytes.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_the_convolutions_run_on_tensor_cores(op, tmp_path):
    """Each kernel has its dtype's products, fragments by ldmatrix, and copies past registers. sm_75 builds."""
    ptx, _ = compile_kernels(op, tmp_path, "-ptx", "-arch=sm_80")
    found = re.split(r"\.visible \.entry ", ptx.read_text())[1:]
    kernels = [kernel for kernel in found if re.match(rf"\w*{op}_kernelI", kernel)]
    assert len(found) == KERNELS[op] and len(kernels) == KERNELS[op] - (op == "conv1x1")
    for kernel in kernels:
        dtype, vectors = re.match(rf"\w*{op}_kernelI(\w+?)NS0_9TileShape\w+?ELb([01])E", kernel).groups()
        assert re.search(f"mma.sync.aligned.{PRODUCTS[dtype]}", kernel) and "ldmatrix" in kernel
        assert ("cp.async.cg" in kernel) == (vectors == "1")
        assert not re.search(r"\b(atom|red)\.", kernel)
    compile_kernels(op, tmp_path, "-ptx", "-arch=sm_75")


def test_the_gram_matrix_runs_on_tensor_cores(tmp_path):
    """Of 16 bits, from transposed fragments; float32 is multiplied in full. Rows are copied past registers."""
    ptx, _ = compile_kernels("gram", tmp_path, "-ptx", "-arch=sm_80")
    kernels = [k for k in re.split(r"\.visible \.entry ", ptx.read_text())[1:] if re.match(r"\w*gram_kernelI", k)]
    assert len(kernels) == 6
    products = {"6__half": "m16n8k16.*f16.f16", "13__nv_bfloat16": "m16n8k16.*bf16.bf16"}
    for kernel in kernels:
        dtype, vectors = re.match(r"\w*gram_kernelI(\w+?)Lb([01])E", kernel).groups()
        if dtype in products:
            assert re.search(f"mma.sync.aligned.{products[dtype]}", kernel) and re.search(r"ldmatrix.*\.trans", kernel)
        else:
            assert "mma.sync" not in kernel and "fma.rn.f32" in kernel and "ld.shared.v4" in kernel
        assert ("cp.async.cg" in kernel) == (vectors == "1")
        assert not re.search(r"\b(atom|red)\.", kernel)


@pytest.mark.parametrize(("op", "count", "writes"), [(op, *rest) for op, rest in PASSES.items()])
def test_vector_kernels_access_sixteen_bytes(op, count, writes, tmp_path):
    ptx, _ = compile_kernels(op, tmp_path, "-ptx", "-arch=sm_90")
    kernels = re.split(r"\.visible \.entry ", ptx.read_text())[1:]
    vectors = [k for k in kernels if re.match(rf"\w*{op}_kernelI(?:f|6__half|13__nv_bfloat16)Lb1E", k)]
    assert len(vectors) == count
    for kernel in vectors:
        name = kernel.split("(")[0]
        assert re.search(r"ld\.global\S*\.v4", kernel), f"{name} does not load 16 bytes at a time"
        assert not writes or re.search(r"st\.global\S*\.v4", kernel), f"{name} does not store 16 bytes at a time"
