"""Compiled loops at all levels of the CPU up to this machine's, of which the library runs the best alone."""

import subprocess
from pathlib import Path

import pytest
import torch
from on_cpu import COMPILER, SANITIZERS, TRAPS

from resnet_fused import library

#: By source file, ``NAME_levels.cpp``: how many shapes it tries.
SHAPES = {"conv1x1": 101, "conv_pointwise": 240, "dense": 48, "grouped": 90, "stem": 120, "winograd": 432}
FOLDER = Path(__file__).parent
INCLUDES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(Path(torch.__file__).parent / "include")]
#: Not optimised, as optimising what the sanitizers add took four times as long, and the programs run for a second.
FLAGS = ["-std=c++20", *SANITIZERS, "-Wall", "-Werror"]
#: Nor is a level compiled that would not be run, which is the largest. By what the loaded library found of this CPU.
if library.status().build_info.get("cpu_level", "avx512") != "avx512":
    FLAGS.append("-DRESNET_FUSED_WITHOUT_512")


def test_every_source_is_run():
    assert {path.name for path in FOLDER.glob("*_levels.cpp")} == {f"{name}_levels.cpp" for name in SHAPES}


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.skipif(not (FOLDER.parents[1] / "csrc").exists(), reason="not in the source tree")
@pytest.mark.parametrize("name", SHAPES)
def test_every_level_is_exact_and_stays_within_its_buffers(tmp_path, name):
    program, source = tmp_path / name, FOLDER / f"{name}_levels.cpp"
    for traps in (TRAPS, ()):
        command = [COMPILER, *FLAGS, *traps, *INCLUDES, str(source), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        if "cannot find -lasan" in done.stderr or "cannot find -lubsan" in done.stderr:
            pytest.skip(f"{COMPILER} has no sanitizers")
        assert done.returncode == 0, done.stderr
        done = subprocess.run([program], capture_output=True, text=True, timeout=600)
        if done.returncode >= 0:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    assert f" 0 wrong in {SHAPES[name]} shapes" in done.stdout
