"""What the compiler makes of every Triton launch, for GPUs this machine need not have."""

import os

import pytest
from triton_processes import rows_for_all, rows_of

from resnet_fused.backends.triton import splits
from resnet_fused.backends.triton.configs import Config

# Registers per thread: a block of 128 threads then finds room on an SM four times (128) or three times (168).
REGISTERS = {
    "bn_stats_kernel": 64,
    "bn_stats_merge_kernel": 160,  # 512 chunks at once after a convolution, by a block of 256 threads
    "norm_add_relu_kernel": 128,
    "norm_add_relu_backward_kernel": 168,
    "gate_add_relu_kernel": 128,
    "gate_add_relu_backward_kernel": 168,
    "norm_act_kernel": 128,
    "norm_act_backward_kernel": 168,
    "norm_act_apply_kernel": 128,
    "sum_chunks_kernel": 48,
    "coefficients_of_chunks_kernel": 64,
    "lazy_grad_apply_kernel": 128,
    "conv1x1_wgrad_merge_kernel": 64,
    "gram_merge_kernel": 64,
    "gram_grad_coefficients_kernel": 128,
    "norm_relu_pool_kernel": 128,
    "norm_relu_pool_backward_kernel": 128,
    "norm_relu_pool_apply_kernel": 128,
    "norm_relu_avg_pool_kernel": 128,
    "norm_relu_avg_pool_backward_kernel": 128,
    "norm_relu_avg_pool_apply_kernel": 128,
    "dense_leave_kernel": 128,
    "dense_merge_kernel": 64,
    "bn_affine_kernel": 64,
    "bn_coefficients_kernel": 64,
    "running_affine_kernel": 64,
    "running_update_kernel": 64,
}
PIXELWISE = ["bn_stats_kernel", "norm_add_relu_kernel", "norm_add_relu_backward_kernel", "lazy_grad_apply_kernel"]
NARROW = ["conv1x1_backward_kernel"]  # in 16 bits alone
PRODUCTS = [f"conv1x1{name}_kernel" for name in ("", "_join", "_dgrad", "_wgrad")] + ["gram_kernel", *NARROW]
PRODUCTS += [f"dense_conv3x3{name}_kernel" for name in ("", "_dgrad", "_wgrad")] + ["dense_conv1x1_backward_kernel"]
SPLIT = ("conv1x1_wgrad_kernel", "conv3x3_wgrad_kernel", "conv1x1_backward_kernel", "gram_kernel")  # and sums of theirs
SMALL_PRODUCTS = ["gram_norm_kernel", "gram_grad_kernel"]  # float32, once a layer
SMALL_PRODUCTS += ["gram_grad_rows_kernel", "gram_grad_coupling_kernel"]
#: `TRITON_ARCHS="90"` for this one alone.
ARCHS = tuple(map(int, os.environ.get("TRITON_ARCHS", "80 90 100 120").split()))
SHARED_BYTES = 4096  # without products: only for reductions across threads and for laying out vectors
SHARED_BYTES_OF = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # that a block can have
TENSOR_CORES = {80: ["mma"], 90: ["wgmma"], 100: ["tcgen05", "mma"], 120: ["mma"]}  # one of these instructions


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One row for each compiled launch, all from one process."""
    return rows_for_all("script_compile.py", tmp_path_factory)


def label(row):
    return f"{row['kernel']} ({row['options']}) {row['dtype']} C={row['channels']} sm_{row['arch']}"


def test_everything_is_compiled_for_every_architecture(rows):
    compiled = {(row["kernel"], row["dtype"], row["arch"]) for row in rows}
    dtypes = ("float32", "bfloat16", "float16")
    assert {(name, dtype, arch) for name in PIXELWISE for dtype in dtypes for arch in ARCHS} <= compiled
    products = PRODUCTS + SMALL_PRODUCTS
    assert {(name, "bfloat16", arch) for name in products for arch in ARCHS} <= compiled
    assert {(name, dtype, 90) for name in PRODUCTS for dtype in dtypes[name in NARROW :]} <= compiled
    assert {(name, dtype, 90) for name in SMALL_PRODUCTS for dtype in dtypes[:2]} <= compiled  # of 16 bits, one
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (n, arch) for n in (*REGISTERS, *products) for arch in ARCHS
    }


def test_no_spills_and_bounded_registers_and_shared_memory(rows):
    """Products may take all registers that a block can have: their accumulators are there for. So may odd layers.

    Tiles were chosen with the pinned Triton; another orders code differently.
    """
    for row in rows:
        assert row["spills"] == row["stack"] == 0, f"{label(row)} spills: {row}"
        most = 255 if row["channels"] % 8 else REGISTERS.get(row["kernel"], 255)
        assert 0 < row["registers"] <= most, f"{label(row)} takes {row['registers']} registers"
        assert row["registers"] * 32 * row["warps"] <= 65536, f"{label(row)} finds no room on an SM"
        most = SHARED_BYTES if row["kernel"] in REGISTERS else SHARED_BYTES_OF[row["arch"]]
        assert row["shared"] <= most, f"{label(row)} takes {row['shared']} bytes of shared memory"


def test_as_many_programs_are_resident_as_splits_count_on(rows):
    """`splits.resident` promises no more than registers and shared memory leave room for."""
    for row in rows:
        if row["kernel"].removeprefix("dense_") in SPLIT:
            registers = -(-row["registers"] * 32 // 256) * 256 * row["warps"]  # a warp's come in parts of 256
            fit = min(65536 // registers, SHARED_BYTES_OF[row["arch"]] // row["shared"])
            assert fit >= splits.resident(Config(0, 0, 0, row["warps"], 0)), f"{label(row)}: {fit} are resident"


def test_products_use_tensor_cores(rows):
    """float32 does where TF32 is allowed, and nowhere in the Gram matrix, whose digits cancel later."""
    for row in rows:
        full = "full float32" in row["options"] or (row["kernel"] == "gram_kernel" and row["dtype"] == "float32")
        if row["kernel"] in PRODUCTS and not full:
            used = set(row["products"]) & set(TENSOR_CORES[row["arch"]])
            assert used, f"{label(row)} multiplies with {row['products']}"
            assert row["tf32"] == (row["dtype"] == "float32"), f"{label(row)}: TF32 {row['tf32']}"
        else:
            assert not row["products"] and not row["tf32"], f"{label(row)} multiplies with {row['products']}"


def test_activations_move_16_bytes_at_a_time(rows):
    """At C a multiple of 8, also 24. Narrower loads are vectors (8 bytes or more), factors (4) and packed masks (1)."""
    for row in rows:
        if row["kernel"] not in PIXELWISE or row["channels"] % 8:
            continue
        loads, stores = row["loads"], row["stores"]
        assert loads.get("128", 0) > 0, f"{label(row)} has no 128-bit load: {loads}"
        assert "16" not in loads and "16" not in stores, f"{label(row)} moves single 16-bit values: {loads} {stores}"
        assert "32" not in loads or "factor" in row["options"], f"{label(row)} loads single floats: {loads}"
        assert "8" not in loads or "bits" in row["options"], f"{label(row)} loads bytes: {loads}"
        if row["kernel"] in ("norm_add_relu_kernel", "lazy_grad_apply_kernel"):
            assert set(stores) <= {"128", "8"} and stores["128"] > 0, f"{label(row)} stores {stores}"


def test_operands_of_products_move_16_bytes_at_a_time(rows):
    """Into registers or straight to shared memory; vectors come one float a thread, masks one byte."""
    for row in rows:
        if row["kernel"] not in PRODUCTS or row["channels"] % 8:
            continue
        loads, stores, copies = row["loads"], row["stores"], row["copies"]
        assert "128" in loads or "128" in copies, f"{label(row)} loads {loads}, copies {copies}"
        assert "128" in stores, f"{label(row)} stores {stores}"
        assert "16" not in {*loads, *stores}, f"{label(row)} moves single 16-bit values: {loads} {stores}"
        assert "8" not in {*loads, *stores} or "mask" in row["options"] or "bits" in row["options"], label(row)


def test_relu_is_a_select_and_sums_have_no_atomics(rows):
    """``max.f32`` drops NaN; atomics would make sums depend on the order in which blocks run."""
    for row in rows:
        assert not row["float_max"], f"{label(row)} has {row['float_max']}"
        assert row["atomics"] == 0, f"{label(row)} has atomics"


def test_launches_bind_and_sizes_do_not_recompile(tmp_path):
    """Batch and image size compile nothing new, but for how many splits a merge takes at once; widths, a few tiles."""
    (variants,) = rows_of("script_binding.py", tmp_path)
    for call, kernels in variants["sizes"].items():
        assert all(count == 1 or "merge" in name for name, count in kernels.items()), f"{call}: {kernels}"
    for kernels in (*variants["sizes"].values(), *variants["widths"].values()):
        assert all(count <= 3 for count in kernels.values()), variants
    launched = {name for kernels in variants["sizes"].values() for name in kernels}
    assert launched == {*REGISTERS, *PRODUCTS, *SMALL_PRODUCTS}
