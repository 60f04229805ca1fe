"""No threads of a kernel race, and each barrier is there for a reason: without it some do. See races.cpp."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import on_cpu
import pytest

KERNELS = on_cpu.SOURCES.parents[1] / "csrc/cuda/kernels"
pytestmark = on_cpu.needed

#: Of each program headers whose barriers are left out one by one, and how many of them its cases do without: of
#: conv1x1_dgrad those that a tile without a weight, or the second of a chunk, is in need of.
PROGRAMS = {
    "conv.cpp": {"conv_norm_add_relu": 0, "conv_tile": 0, "patch": 0},
    "conv1x1.cpp": {"conv1x1": 0, "conv_statistics": 0},
    "conv1x1_gradients.cpp": {"conv1x1_dgrad": 2, "conv1x1_wgrad": 0, "gradient_sums": 0},
    "gram.cpp": {"gram": 0, "gram_rows": 0, "gram_norm": 0, "gram_grad": 0, "weight_panel": 0},
    "pooling.cpp": {"fold": 0},
}


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    return on_cpu.race_checker(tmp_path_factory.mktemp("races"))


def barriers(header: str) -> list[str]:
    lines = (KERNELS / f"{header}.cuh").read_text().splitlines()
    return [f"{header}.cuh:{i}" for i, line in enumerate(lines, 1) if re.search(r"__sync(threads|warp)\(\)", line)]


def race_without(program: Path, barrier: str) -> bool:
    done = subprocess.run([program], capture_output=True, text=True, env={"CUDA_ON_CPU_WITHOUT": barrier})
    assert done.returncode == 0 or "race at byte" in done.stderr, done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("source", PROGRAMS)
def test_no_threads_race_and_without_a_barrier_some_would(source, checker, tmp_path):
    program = on_cpu.race_checked(source, tmp_path, checker)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
    for header, spare in PROGRAMS[source].items():
        missed = [barrier for barrier in barriers(header) if not race_without(program, barrier)]
        assert len(missed) == spare, f"no threads race without {missed}"
