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
COMMAND = [COMPILER, *FLAGS]

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
    _run([*COMMAND, str(SOURCES / source), "-o", str(output), *flags])
    return output


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def race_checker(directory: Path) -> Path:
    """What race_checked links, see races.cpp."""
    return _object("races.cpp", directory, "-O2")


def race_checked(source: str, directory: Path, checker: Path) -> Path:
    """The program made of `source`, which ends with an error where threads of a kernel race."""
    made = _object(source, directory, "-g1", "-DRESNET_FUSED_SANITIZED", "-fsanitize=thread")
    program = directory / f"{source}.races"
    _run([COMPILER, str(made), str(checker), "-o", str(program)])
    return program


def _object(source: str, directory: Path, *flags: str) -> Path:
    output = directory / f"{source}.o"
    _run([*COMMAND, "-DCUDA_ON_CPU_RACES", *flags, "-c", str(SOURCES / source), "-o", str(output)])
    return output
