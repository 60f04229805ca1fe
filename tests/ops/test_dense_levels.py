"""The 3x3 convolutions of dense blocks at all levels of the CPU up to this machine's, of which the library runs one."""

import subprocess
from pathlib import Path

import pytest
import torch
from on_cpu import COMPILER

SOURCE = Path(__file__).with_name("dense_levels.cpp")
INCLUDES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(Path(torch.__file__).parent / "include")]
FLAGS = "-std=c++20 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Werror".split()


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.skipif(not (SOURCE.parents[2] / "csrc").exists(), reason="not in the source tree")
def test_every_level_is_exact_and_stays_within_its_buffers(tmp_path):
    program = tmp_path / "dense_levels"
    done = subprocess.run(
        [COMPILER, *FLAGS, *INCLUDES, str(SOURCE), "-o", str(program)], capture_output=True, text=True
    )
    if "cannot find -lasan" in done.stderr or "cannot find -lubsan" in done.stderr:
        pytest.skip(f"{COMPILER} has no sanitizers")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 wrong in 48 shapes" in done.stdout
