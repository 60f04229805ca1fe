"""What the compiler makes of every Triton launch, for GPUs this machine need not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# Registers per thread: a block of 128 threads then finds room on an SM four times (128) or three times (168).
REGISTERS = {
    "bn_stats_kernel": 64,
    "bn_stats_merge_kernel": 80,
    "norm_add_relu_kernel": 128,
    "norm_add_relu_backward_kernel": 168,
    "sum_chunks_kernel": 48,
    "lazy_grad_apply_kernel": 128,
}
SHARED_BYTES = 4096  # only for reductions across threads and for laying out vectors
PIXELWISE = [name for name in REGISTERS if "merge" not in name and "chunks" not in name]


def run_script(name, cache):
    """The rows that a script beside this file prints, run where Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    script = Path(__file__).with_name(name)
    ran = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One row for each compiled launch, all from one process."""
    return run_script("triton_compile.py", tmp_path_factory.mktemp("triton"))


def label(row):
    return f"{row['kernel']} ({row['options']}) {row['dtype']} C={row['channels']} sm_{row['arch']}"


def test_everything_is_compiled_for_every_architecture(rows):
    compiled = {(row["kernel"], row["dtype"], row["arch"]) for row in rows}
    wanted = {
        (name, dtype, arch)
        for name in PIXELWISE
        for dtype in ("float32", "bfloat16", "float16")
        for arch in (80, 90, 100)
    }
    assert wanted <= compiled
    assert {row["kernel"] for row in rows} == set(REGISTERS)


def test_no_spills_and_bounded_registers_and_shared_memory(rows):
    for row in rows:
        assert row["LOCAL"] == 0 and row["STACK"] == 0, f"{label(row)} spills: {row}"
        most = REGISTERS[row["kernel"]] if row["channels"] % 8 == 0 else 255  # an address for every single element
        assert 0 < row["REG"] <= most, f"{label(row)} takes {row['REG']} registers"
        assert row["shared"] <= SHARED_BYTES, f"{label(row)} takes {row['shared']} bytes of shared memory"


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


def test_relu_is_a_select_and_sums_have_no_atomics(rows):
    """``max.f32`` drops NaN; atomics would make sums depend on the order in which blocks run."""
    for row in rows:
        assert not row["float_max"], f"{label(row)} has {row['float_max']}"
        assert row["atomics"] == 0, f"{label(row)} has atomics"


def test_launches_bind_and_sizes_do_not_recompile(tmp_path):
    """Two tile widths, where C is 64 and where it is more; batch and image size compile nothing new."""
    (variants,) = run_script("triton_binding.py", tmp_path)
    assert set(variants) == set(REGISTERS)
    pointwise = {"norm_add_relu_kernel", "lazy_grad_apply_kernel"}
    assert all(count == (2 if name in pointwise else 1) for name, count in variants.items()), variants
