"""Compile the CUDA sources for the CPU, see cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "cuda_on_cpu"
COMPILER = next(filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]))), None)
FLAGS = "-std=c++20 -O1 -fno-strict-aliasing -Wall -Werror -Wno-unknown-pragmas".split()

needed = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's ucontext"),
]


def compiled(source: str, directory: Path, *flags: str) -> Path:
    """The library made of the file `source` of tests/cuda_on_cpu."""
    return _made(source, directory / f"{source}.so", "-shared", "-fPIC", *flags)


def program(source: str, directory: Path, *flags: str) -> Path:
    """The program made of the file `source` of tests/cuda_on_cpu."""
    return _made(source, directory / f"{source}.out", *flags)


def _made(source: str, output: Path, *flags: str) -> Path:
    command = [COMPILER, *FLAGS, str(SOURCES / source), "-o", str(output), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output
