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
SANITIZERS = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all".split()
#: Undefined behaviour ends the program by a signal: code that says what it was takes up to twice as long to compile, so
#: that is made of a program alone that a signal ended.
TRAPS = ("-fsanitize-undefined-trap-on-error",)

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


def run_sanitized(source: str, directory: Path) -> subprocess.CompletedProcess:
    """What the program of `source` wrote under AddressSanitizer and UBSan, and how it ended."""
    for traps in (TRAPS, ()):
        made = program(source, directory, *SANITIZERS, "-DRESNET_FUSED_SANITIZED", *traps)
        done = subprocess.run([made], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
        if done.returncode >= 0:
            break
    return done


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
