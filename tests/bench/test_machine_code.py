"""What benchmarks/machine_code.py reads out of machine code, on a few lines of it with counts known by hand."""

from __future__ import annotations

import collections
import importlib
import pathlib
import sys

import pytest
import torch
from nets import BasicBlock, block
from torch import nn

import build_support
from resnet_fused.backends.cards import Card
from resnet_fused.plan import devices
from resnet_fused.traffic.calls import calls

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"

#: Over tiles: a load, then over the depth two products, then, unless P1 says no, a store.
NESTED = """
                Function : first
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;        /* 0x0000000402047981 */
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/                   HMMA.1688.F32.TF32 R8, R4, R6, R8 ;
        /*0040*/                   LDSM.16.M88.4 R4, [R20] ;
        /*0050*/               @P0 BRA 0x20 ;
        /*0060*/                   F2FP.BF16.F32.PACK_AB R8, R9, R8 ;
        /*0070*/               @P1 BRA 0xa0 ;
        /*0080*/                   F2FP.BF16.F32.PACK_AB R8, RZ, R8 ;
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*00a0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00b0*/                   BRA.U UP0, 0x10 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
                Function : second
        /*0000*/                   LDG.E.U8 R4, desc[UR4][R2.64] ;
        /*0010*/                   EXIT ;
"""
DESCRIBED = """
        /*0000*/                   UMOV UR11, 0x8200490 ;
        /*0010*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   EXIT ;
"""


@pytest.fixture
def modules(monkeypatch):
    """Those of the script's folder that need no Triton."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield [importlib.import_module(name) for name in ("sass", "issue_bounds")]
    forget()


def forget():
    for name in ("sass", "issue_bounds", "loop_trips", "binaries", "cuda_binaries"):
        sys.modules.pop(name, None)


@pytest.fixture
def compiled(monkeypatch):
    """The script that reads compiled kernels, where nvcc would make one without an instruction for each launch."""
    pytest.importorskip("triton", reason="whose cuobjdump is asked")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("cuda_binaries")
    empty = importlib.import_module("binaries").Binary((), 32, 0, 8, 3, 0)
    monkeypatch.setattr(module, "kernels", lambda source, arch: collections.defaultdict(lambda: empty))
    monkeypatch.setattr(build_support, "find_nvcc", lambda: "nvcc")
    yield module
    forget()


def test_blocks_and_loops(modules):
    sass, _ = modules
    functions = sass.functions(NESTED)
    assert [len(code) for code in functions.values()] == [14, 2]
    found = sass.blocks(functions["first"])
    assert [block.code[0].address for block in found] == [0x00, 0x10, 0x20, 0x60, 0x80, 0xA0, 0xC0, 0xD0]
    assert [block.after for block in found] == [(1,), (2,), (2, 3), (5, 4), (5,), (1, 6), (), (7,)]
    outer, inner = sass.loops(found)
    assert (outer.header, outer.blocks, outer.every) == (1, {1, 2, 3, 4, 5}, {1, 2, 3, 5})
    assert (inner.header, inner.blocks) == (2, {2})
    assert sass.own_blocks(outer, [outer, inner]) == {1, 3, 4, 5}


def test_kinds_and_widths(modules):
    sass, _ = modules
    code = sass.functions(NESTED)["first"]
    counted = sass.kinds(code)
    assert (counted["tensor"], counted["load"], counted["store"], counted["shared"]) == (2, 1, 1, 1)
    assert (counted["convert"], counted["single"], counted["integer"], counted["control"]) == (2, 1, 1, 5)
    assert sass.kinds(sass.functions(NESTED)["second"])["byte load"] == 1
    assert [each.bytes for each in code if each.kind in ("load", "shared", "store")] == [16, 16, 16]


def test_sizes_of_products(modules):
    """A warp's, a warp group's, and that of a descriptor: 128 rows (8 << 24) by 128 columns (16 << 17)."""
    sass, bounds = modules
    code = sass.functions(NESTED)["first"]
    assert [sass.product_shape(i, code) for i in code if i.kind == "tensor"] == [(16, 8, 16), (16, 8, 8)]
    described = sass.instructions(DESCRIBED)
    products = [each for each in described if each.kind == "tensor"]
    assert [sass.product_shape(each, described) for each in products] == [(128, 128, 16), (64, 128, 16)]
    assert [sass.flops(each, described, 8) for each in products] == [2 * 128 * 128 * 16, 2 * 2 * 64 * 128 * 16]
    assert [bounds.operand_bytes(each, described, 8) for each in products] == [2 * 16 * 256, 2 * 2 * 16 * 192]


def test_how_often_each_block_runs(modules):
    pytest.importorskip("triton", reason="the kernels' arguments are those of Triton's")
    sass, _ = modules
    trips = importlib.import_module("loop_trips")
    code = sass.functions(NESTED)["first"]
    blocks = sass.blocks(code)
    counted = trips.frequencies(blocks, code, 4, trips.Trips(5, (3,)))
    assert counted.often[:7] == (1, 5, 15, 5, 5, 5, 1) and counted.main.header == 2
    step = 4 * (2 * 16 * 8 * 16 + 2 * 16 * 8 * 8)
    halved = trips.frequencies(blocks, code, 4, trips.Trips(5, (6,), step_flops=step // 2))
    assert halved.often[:7] == (1, 5, 15, 5, 5, 5, 1), "a loop that does two steps a round"


def test_bounds_of_a_block(modules):
    sass, bounds = modules
    code = sass.functions(NESTED)["first"]
    done = bounds.work(code[1:6], code, 8)
    assert (done.issued, done.flops, done.async_flops) == (5 * 8, 8 * 2 * 16 * 8 * 24, 0)
    assert (done.shared, done.loaded) == (32 * 8 * 16, 32 * 8 * 16)
    h100 = devices.find("h100")
    found = bounds.bounds(done.times(100), 132 * 2 + 1, 3_350_000, h100)
    clock = bounds.clock(h100)
    assert clock == pytest.approx(1.83e9, rel=0.01)
    assert found.issue == pytest.approx(3 * 100 * 40 / 4 / clock), "three blocks on the busiest multiprocessor"
    assert found.shared == pytest.approx(3 * 100 * 4096 / 128 / clock)
    assert found.tensor == pytest.approx(3 * 100 * done.flops / 4096 / 0.62 / clock)
    assert found.memory == pytest.approx(1e-6) and found.reason == "shared memory" and found.own == found.shared


def test_blocks_of_a_multiprocessor(modules):
    """By registers in parts of 256 a warp, by shared memory with 1 KB more for each, by warps."""
    _, bounds = modules
    assert bounds.resident(128, 0, 8, 90) == 2 and bounds.resident(129, 0, 8, 90) == 1
    assert bounds.resident(32, 75 << 10, 8, 90) == 3 and bounds.resident(32, 75 << 10, 8, 80) == 2
    assert bounds.resident(16, 0, 4, 80) == 16


def starts(compiled, model, x, training):
    """Launches of compiled kernels in a step of `model` on an H100."""
    given = torch.empty(x, device="meta")
    found = calls(nn.Sequential(model), given, training, devices.find("h100"), torch.bfloat16, incomplete=True)
    return [start for call in found for start in compiled.starts_of(call, Card()) or []]


def test_launches_of_a_step_by_compiled_kernels(compiled):
    """Of a basic block: a 3x3 of a tensor and one that normalises, each with a merge of partial statistics.

    Of 802816 pixels and 64 outputs 6272 tiles of 128x64, each of 9 steps of 64; three tiles make a chunk.
    """
    found = starts(compiled, block(64, 64, kind=BasicBlock), (256, 64, 56, 56), training=True)
    assert [start.kernel for start in found] == ["conv_values (CUDA)", "merge_moments (CUDA)"] * 2
    assert [start.shape for start in found[::2]] == [
        "64x56x56 to 64, 3x3; 128x64x64; partial",
        "64x56x56 to 64, 3x3; 128x64x64; x_scale partial",
    ]
    assert {start.programs for start in found[::2]} == {6272}
    assert {(start.trips.products, start.trips.step_flops) for start in found[::2]} == {((9,), 2 * 128 * 64 * 64)}
    chunks = -(-6272 // 3)
    partial = 12 * 64 * chunks
    tensors, weight = 2 * 2 * 256 * 64 * 56 * 56, 2 * 9 * 64 * 64
    assert {start.moved for start in found[::2]} == {tensors + weight + partial}
    assert {start.moved for start in found[1::2]} == {partial}
    assert {(start.programs, start.trips.tiles) for start in found[1::2]} == {(8, -(-chunks // 64))}


def test_launches_of_an_evaluation_by_compiled_kernels(compiled):
    """Of a strided bottleneck: its projection is part of the last launch, whose scales are of the kernel's making."""
    found = starts(compiled, block(256, 128, stride=2), (256, 256, 56, 56), training=False)
    assert [start.kernel for start in found] == ["conv_norm_add_relu (CUDA)"] * 2 + ["conv1x1_join (CUDA)"]
    assert [start.shape for start in found] == [
        "256x56x56 to 128, 1x1; 128x128x64; ",
        "128x56x56 to 128, 3x3 by 2; 128x128x64; ",
        "128x28x28 to 512, 1x1; 128x64x64; x2",
    ]
    pixels = 256 * 28 * 28
    assert [start.programs for start in found] == [4 * pixels // 128, pixels // 128, pixels // 128 * 8]
    assert [start.trips.products for start in found] == [(4,), (18,), (2, 4)]
    assert found[2].moved == 2 * (pixels * (128 + 256 + 512) + 512 * (128 + 256)), "of x2 every second pixel a side"


def test_tiles_of_compiled_kernels(compiled):
    """As csrc/cuda/kernels/conv_shapes.cuh and conv1x1.cuh choose them."""
    assert [compiled.tile_of(k, 12544, True, 132) for k in (64, 128, 256)] == [(64, 64), (128, 64), (128, 128)]
    assert compiled.tile_of(64, 3211264, False, 132) == (128, 64)
    assert [compiled.tiles_of_chunk(64, 64, 128, 6272, sms) for sms in (132, 1000)] == [3, 1]


def test_compiled_kernels_by_name_and_as_built(compiled, monkeypatch):
    begin = "_ZN12resnet_fused4cuda"
    tile, end = "I13__nv_bfloat16NS0_9TileShapeILi128ELi64EEELb1E", "EEvNS_13Conv1x1ParamsENS0_12ChunkedTilesET2_"
    found = compiled.instance_of(f"{begin}14conv1x1_kernel{tile}NS0_8NormReluE{end}")
    assert found == compiled.Instance(128, 64, norm=True)
    assert compiled.instance_of(f"{begin}14conv1x1_kernel{tile}NS0_6AsItIsE{end}") == compiled.Instance(128, 64)
    second = compiled.instance_of(f"{begin}19conv1x1_join_kernel{tile}NS0_6AsItIsELb1E{end}")
    assert second == compiled.Instance(128, 64, second=True)
    scalar = compiled.instance_of(f"{begin}25conv_norm_add_relu_kernel{tile.replace('Lb1', 'Lb0')}{end}")
    assert scalar == compiled.Instance(128, 64, vectors=False)
    assert compiled.instance_of(f"{begin}20merge_moments_kernelILi8ELi64EEEvPKf") == compiled.Instance()
    assert compiled.instance_of(f"{begin}14bn_stats_kernelIfLb1EEEv") is None
    monkeypatch.setattr(build_support, "known_architectures", lambda nvcc: {"8.0", "8.6", "9.0", "10.0", "12.0"})
    assert compiled.as_built("nvcc", 90) == "-gencode=arch=compute_80,code=sm_90"
    with pytest.raises(ValueError, match="sm_86 by default"):
        compiled.as_built("nvcc", 86)
