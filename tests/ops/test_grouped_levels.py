"""Grouped convolutions at all levels of the CPU up to this machine's, of which the library runs the best alone."""

import subprocess
from pathlib import Path

import pytest
from on_cpu import COMPILER

SOURCE = Path(__file__).with_name("grouped_levels.cpp")
FLAGS = "-std=c++20 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Werror".split()


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.skipif(not (SOURCE.parents[2] / "csrc").exists(), reason="not in the source tree")
def test_every_level_is_exact_and_stays_within_its_buffers(tmp_path):
    program = tmp_path / "grouped_levels"
    done = subprocess.run([COMPILER, *FLAGS, str(SOURCE), "-o", str(program)], capture_output=True, text=True)
    if "cannot find -lasan" in done.stderr or "cannot find -lubsan" in done.stderr:
        pytest.skip(f"{COMPILER} has no sanitizers")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 wrong in 90 shapes" in done.stdout
