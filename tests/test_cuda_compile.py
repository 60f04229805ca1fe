"""Compile the CUDA kernels with nvcc, alone and without torch: no spills, few registers, 16-byte accesses."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import once
import pytest

import build_support
from resnet_fused import library

ROOT = Path(__file__).parent.parent
#: What CI builds; `make budgets` asks of all others too. `CUDA_ARCHS="120"` for this one alone.
ARCHITECTURES = tuple(os.environ.get("CUDA_ARCHS", "80 90 100").split())
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
    "conv1x1": 2 * 2 * 4 + 2 * 3 + 1,  # plain or lazy; and the merge
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
#: Shared memory that launches ask for, by the shape of a tile: KB at most.
SHARED = {
    "conv_shared_bytes<Shape>()": {"128, 128": 99, "128, 64": 81, "64, 64": 53},
    "conv1x1_shared_bytes<Shape>()": {"128, 128": 99, "128, 64": 81, "64, 64": 53},
    "conv1x1_join_shared_bytes<Shape>()": {"128, 64": 81, "64, 64": 53},
    "conv1x1_dgrad_shared_bytes<Shape>()": {"64, 128": 53, "64, 64": 53},
    "conv1x1_wgrad_shared_bytes<__half, Shape>()": {"64, 128": 53, "128, 64": 53, "64, 64": 53},
    "conv1x1_wgrad_shared_bytes<float, Shape>()": {"64, 128": 53, "64, 64": 53},
    "kGramStages * GramStage<__half>::kBytes": {"": 81},
    "kGramStages * GramStage<float>::kBytes": {"": 81},
}
#: The products of each dtype on tensor cores, by its name in a kernel's.
PRODUCTS = {"f": "m16n8k8.*tf32.tf32", "6__half": "m16n8k16.*f16.f16", "13__nv_bfloat16": "m16n8k16.*bf16.bf16"}
#: Bytes of stack that are no spill: pointers that a loop goes through.
STACK = {"fold_partial_kernelILi2E": 40, "fold_partial_kernelILi4E": 56}
#: CUDA's own tool, which Triton brings along.
TRITON = importlib.util.find_spec("triton")
CUOBJDUMP = Path(TRITON.origin).parent / "backends/nvidia/bin/cuobjdump" if TRITON else Path("no Triton")


def nvcc() -> str:
    found = build_support.find_nvcc()
    if found is None:
        pytest.skip("needs nvcc")
    return found


def run_nvcc(source: Path, output: Path, *flags: str) -> str:
    """What nvcc says while it compiles `source`, of which nothing is a warning."""
    command = [nvcc(), *build_support.KERNEL_FLAGS, f"-I{ROOT}", *flags, str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    log = result.stdout + result.stderr
    assert result.returncode == 0 and "warning" not in log, log
    return log


def compile_kernels(op: str, output: Path, *flags: str) -> str:
    """Every kernel of `op`, from nothing but its own headers."""
    return run_nvcc(ROOT / "csrc/cuda/kernels" / f"{op}.cu", output, *flags)


def ptx(op: str, tmp_path_factory, architecture: str) -> str:
    """The PTX of all kernels of `op`: what the build assembled, where it kept it, else compiled once."""

    def make(path):
        built = object_built(op) if architecture == ptx_built() else None
        if built is None:
            compile_kernels(op, path, "-ptx", f"-arch=sm_{architecture}")
        else:
            path.write_text(cuobjdump(built, "-ptx"))

    return once.made(tmp_path_factory, f"{op}.{architecture}.ptx", make).read_text()


Used = dict[
    tuple[str, str], tuple[int, int]
]  # (kernel, architecture) -> (registers, bytes of stack, of which spills are part)


def resources_compiled(op: str, directory: Path) -> Used:
    """From the report of ``-Xptxas -v``."""
    as_built = build_support.gencode_flags([f"{a[:-1]}.{a[-1]}" for a in ARCHITECTURES])
    log = compile_kernels(op, directory / f"{op}.o", "-Xptxas=-v", "-c", *as_built)
    found, kernel = {}, None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernel, stack = match.groups(), 0
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack = sum(map(int, match.groups()))
        elif match := re.search(r"Used (\d+) registers", line):
            found[kernel] = (int(match.group(1)), stack)
    return found


def object_built(op: str) -> Path | None:
    """The object of an installed library of the very sources that are here; None if there is none."""
    info = library.status().build_info
    architectures = info.get("cuda_architectures", "").replace(".", "").replace("+PTX", "").split()
    if not set(architectures) >= set(ARCHITECTURES) or info["sources"] != build_support.hash_of(ROOT / "csrc"):
        return None
    found = ROOT.glob(f"build/*-{sys.implementation.cache_tag}/csrc-cuda-kernels-{op}.cu.o")
    return next(found, None) if CUOBJDUMP.exists() else None


def ptx_built() -> str | None:
    """The architecture of the PTX that an installed library has, if all its binaries were assembled from that one.

    None too if the build went on after a warning.
    """
    info = library.status().build_info
    flags = build_support.gencode_flags(info.get("cuda_architectures", "").split())
    found = re.search(r"compute_(\d+)\]$", flags[0]) if len(flags) == 1 else None
    return found.group(1) if found and "-Werror=all-warnings" in info.get("nvcc_flags", "") else None


def cuobjdump(path: Path, option: str) -> str:
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout


def resources_built(path: Path) -> Used:
    """From what the build made."""
    found, architecture, kernel = {}, None, None
    for line in cuobjdump(path, "-res-usage").splitlines():
        if match := re.search(r"^arch = sm_(\w+)", line):
            (architecture,) = match.groups()
        elif match := re.search(r"Function (\w+):", line):
            (kernel,) = match.groups()
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            registers, *stack = map(int, match.groups())
            if architecture in ARCHITECTURES:
                found[kernel, architecture] = (registers, sum(stack))
    return found


@pytest.fixture
def used(request, tmp_path) -> Used:
    """Of the op of a test's parameters, as the build made it, else compiled here."""
    nvcc()
    op = request.node.callspec.params["op"]
    built = object_built(op)
    return resources_built(built) if built else resources_compiled(op, tmp_path)


@pytest.mark.parametrize("op", REGISTERS)
def test_registers_and_spills(op, used):
    assert {architecture for _, architecture in used} == set(ARCHITECTURES)
    assert len(used) == KERNELS[op] * len(ARCHITECTURES), sorted(used)
    print(f"{op}: at most {max(r for r, _ in used.values())} registers")
    stack = {key: next((size for name, size in STACK.items() if name in key[0]), 0) for key in used}
    assert {key: v for key, v in used.items() if v[0] > REGISTERS[op] or v[1] > stack[key]} == {}


@pytest.mark.parametrize("op", VECTORS)
def test_kernels_on_vectors_compile_without_a_warning(op, tmp_path_factory):
    """As all others do in the build, or in the tests of their PTX."""
    assert ptx(op, tmp_path_factory, "80").count(".visible .entry") == KERNELS[op]


@pytest.mark.parametrize("op", CONVOLUTIONS[:2])
def test_smallest_tiles_leave_room_for_a_third_block(op, used):
    """Of a convolution: 64x64 outputs a block, for layers of few pixels."""
    smallest = {key: registers for key, (registers, _) in used.items() if "Li64ELi64E" in key[0]}
    assert len(smallest) == {"conv_norm_add_relu": 3, "conv1x1": 6}[op] * len(ARCHITECTURES)
    assert max(smallest.values()) <= 80


def test_shared_memory(tmp_path):
    """Of a block, in KB: never more than 99, all that one has of sm_86, 89 and 120. 164 and more hold two or three."""
    lines = [
        f"static_assert({size.replace('Shape', f'TileShape<{tile}>')} <= {most} * 1024);"
        for size, tiles in SHARED.items()
        for tile, most in tiles.items()
    ]
    headers = ("conv_norm_add_relu", "conv1x1", "conv1x1_join", "conv1x1_dgrad", "conv1x1_wgrad", "gram")
    text = [*(f'#include "csrc/cuda/kernels/{name}.cuh"' for name in headers), "using namespace resnet_fused::cuda;"]
    source = tmp_path / "bytes.cu"
    source.write_text("\n".join([*text, *lines]))
    run_nvcc(source, tmp_path / "bytes.o", "-c", "-arch=sm_80")


@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_the_convolutions_run_on_tensor_cores(op, tmp_path_factory):
    """Each kernel has its dtype's products, fragments by ldmatrix, and copies past registers. sm_75 builds."""
    found = re.split(r"\.visible \.entry ", ptx(op, tmp_path_factory, "80"))[1:]
    kernels = [kernel for kernel in found if re.match(rf"\w*{op}_kernelI", kernel)]
    assert len(found) == KERNELS[op] and len(kernels) == KERNELS[op] - (op == "conv1x1")
    for kernel in kernels:
        dtype, vectors = re.match(rf"\w*{op}_kernelI(\w+?)NS0_9TileShape\w+?ELb([01])E", kernel).groups()
        assert re.search(f"mma.sync.aligned.{PRODUCTS[dtype]}", kernel) and "ldmatrix" in kernel
        assert ("cp.async.cg" in kernel) == (vectors == "1")
        assert not re.search(r"\b(atom|red)\.", kernel)
    assert ptx(op, tmp_path_factory, "75").count(".visible .entry") == KERNELS[op]


@pytest.mark.parametrize("op", GRADIENTS)
def test_the_gradients_run_on_tensor_cores(op, tmp_path_factory):
    """Each product has its dtype's instruction, columns of 16 bits come by transposing ldmatrix; no atomics."""
    found = re.split(r"\.visible \.entry ", ptx(op, tmp_path_factory, "80"))[1:]
    kernels = [kernel for kernel in found if re.match(rf"\w*{op}_kernelI", kernel)]
    assert len(found) == KERNELS[op] and len(kernels) == {"conv1x1_dgrad": 8, "conv1x1_wgrad": 11}[op]
    for kernel in kernels:
        dtype, vectors = re.match(rf"\w*{op}_kernelI(\w+?)NS0_9TileShape\w+?ELb([01])E", kernel).groups()
        assert re.search(f"mma.sync.aligned.{PRODUCTS[dtype]}", kernel)
        assert ("ldmatrix.sync.aligned.m8n8.x4.trans" in kernel) == (dtype != "f")
        assert vectors == "0" or re.search(r"ld\.global\S*\.v4", kernel)
    assert not any(re.search(r"\b(atom|red)\.", kernel) for kernel in found)


def test_the_gram_matrix_runs_on_tensor_cores(tmp_path_factory):
    """Of 16 bits, from transposed fragments; float32 is multiplied in full. Rows are copied past registers."""
    found = re.split(r"\.visible \.entry ", ptx("gram", tmp_path_factory, "80"))[1:]
    kernels = [kernel for kernel in found if re.match(r"\w*gram_kernelI", kernel)]
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
def test_vector_kernels_access_sixteen_bytes(op, count, writes, tmp_path_factory):
    kernels = re.split(r"\.visible \.entry ", ptx(op, tmp_path_factory, "80"))[1:]
    vectors = [k for k in kernels if re.match(rf"\w*{op}_kernelI(?:f|6__half|13__nv_bfloat16)Lb1E", k)]
    assert len(vectors) == count
    for kernel in vectors:
        name = kernel.split("(")[0]
        assert re.search(r"ld\.global\S*\.v4", kernel), f"{name} does not load 16 bytes at a time"
        assert not writes or re.search(r"st\.global\S*\.v4", kernel), f"{name} does not store 16 bytes at a time"
