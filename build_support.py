"""What setup.py needs to find the tools of a build and to run it. Every failure is one line that says what to do."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

OLDEST_TORCH = (2, 10)  # where the stable ABI has all that csrc uses
OLDEST_NVCC = (12, 0)  # C++20
#: One of each major version that has kernels of its own: a binary runs on the later minor versions of its major one, so
#: 8.0 serves 8.6 and 8.9, 10.0 serves 10.3, and 12.0 serves 12.1. Nothing in csrc/cuda asks for more than 8.0 has:
#: `mma.sync`, `ldmatrix` and `cp.async` are the same instructions there, of which a binary for 8.6 or 8.9 would be
#: another order. So all are assembled from one PTX, of 8.0, which is also there for what comes after the last one.
DEFAULT_ARCHITECTURES = "8.0 9.0 10.0 12.0"
KERNEL_FLAGS = ["-O3", "-std=c++20"]  # of nvcc, for what runs on a GPU


class BuildError(SystemExit):
    """Ends the build with one line; a SystemExit, so that no traceback hides it."""

    def __init__(self, message: str):
        super().__init__(f"resnet_fused: {message}")


def say(message: str) -> None:
    print(f"resnet_fused: {message}", flush=True)


def find_torch() -> tuple[str, Path]:
    """Version and directory of the torch to build against."""
    if find_spec("torch") is None:
        raise BuildError(
            "torch is not importable while building; `pip install torch`, then `pip install --no-build-isolation .` "
            "(without that flag pip builds in an empty environment)"
        )
    import torch

    check_torch(torch.__version__)
    return torch.__version__, Path(torch.__file__).parent


def check_torch(version: str) -> None:
    if version_of(version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f"torch {version} is too old; run `pip install 'torch>={oldest}'` and build again")


def version_of(text: str) -> tuple[int, ...]:
    """The leading `major.minor` of a version, as numbers."""
    return tuple(map(int, re.match(r"(\d+)\.(\d+)", text).groups()))


def find_compiler() -> str:
    """The C++ compiler: CXX, else c++, g++ or clang++."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if shutil.which(name):
            return name
    missing = f"CXX names {chosen}, which is not found" if chosen else "no C++ compiler found"
    raise BuildError(
        f"{missing}; install one (`apt install g++`), or set RESNET_FUSED_SKIP_COMPILE=1 to install pure Python"
    )


def check_python_headers() -> str:
    """The include directory of this Python."""
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        raise BuildError(f"Python.h is not in {include}; install Python's headers (`apt install python3-dev`)")
    return include


def find_nvcc() -> str | None:
    """nvcc in CUDA_HOME, on PATH or in /usr/local/cuda; None if it is not there or not wanted, which is said."""
    wanted = os.environ.get("RESNET_FUSED_CUDA", "")
    if wanted == "0":
        say("RESNET_FUSED_CUDA=0: building without CUDA kernels")
        return None
    candidates = [str(Path(os.environ["CUDA_HOME"], "bin", "nvcc"))] if os.environ.get("CUDA_HOME") else []
    nvcc = next(filter(None, map(shutil.which, [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"])), None)
    problem = "no nvcc found (CUDA_HOME, PATH, /usr/local/cuda)"
    if nvcc:
        version = nvcc_version(nvcc)
        if version_of(version) >= OLDEST_NVCC:
            return nvcc
        problem = f"nvcc {version} is older than {'.'.join(map(str, OLDEST_NVCC))}"
    if wanted == "1":
        raise BuildError(f"RESNET_FUSED_CUDA=1 but {problem}; install the CUDA toolkit and put nvcc on PATH")
    say(f"{problem}: building without CUDA kernels, which is fine for CPUs; Triton serves GPUs")
    return None


def nvcc_version(nvcc: str) -> str:
    return re.search(r"release (\S+),", output_of([nvcc, "--version"])).group(1)


def cuda_headers(nvcc: str) -> str:
    """Where CUDA's headers are, as nvcc would tell the compiler that it runs."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r'INCLUDES="-I(.+?)"', said)
    if not found:
        raise BuildError(f"{nvcc} --dryrun does not say where its headers are; RESNET_FUSED_CUDA=0 builds without CUDA")
    return os.path.realpath(found.group(1))


def cuda_architectures(known: set[str], wanted: str | None = None) -> list[str]:
    """Architectures to build for, such as ``["8.0", "9.0+PTX"]``.

    `known` are those of this nvcc ("8.0", ...). `wanted` is TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"), taken as it is; by
    default the sensible ones among `known`, with PTX for GPUs to come.
    """
    if not wanted:
        chosen = [a for a in DEFAULT_ARCHITECTURES.split() if a in known]
        return [*chosen[:-1], f"{chosen[-1]}+PTX"]
    entries = re.split(r"[;,\s]+", wanted.strip(" ;,"))
    for entry in entries:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry) or entry.split("+")[0].rstrip("af") not in known:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}; pass compute capabilities that this nvcc knows, such as "
                f"'8.0;9.0+PTX', out of {' '.join(sorted(known, key=version_of))}"
            )
    return entries


def known_architectures(nvcc: str) -> set[str]:
    return {f"{a[:-1]}.{a[-1]}" for a in re.findall(r"compute_(\d+)", output_of([nvcc, "--list-gpu-arch"]))}


def gencode_flags(architectures: list[str]) -> list[str]:
    """One compilation for all that run the instructions of the oldest, from 8.0 on, and an assembly for each of them.

    The kernels ask for nothing newer (DEFAULT_ARCHITECTURES), so that its PTX is theirs, and serves what PTX is asked
    for too. Older ones lack tensor cores, and those with a letter ask for what no other has: each is compiled apart.
    """
    numbers = [entry.split("+")[0].replace(".", "") for entry in architectures]
    alike = [number for number in numbers if number.isdecimal() and int(number) >= 80]
    sharing = dict.fromkeys(alike, min(alike, key=int, default=""))
    codes: dict[str, list[str]] = {}
    for number in numbers:
        codes.setdefault(sharing.get(number, number), []).append(f"sm_{number}")
    for number, entry in zip(numbers, architectures, strict=True):
        source = sharing.get(number, number)
        if entry.endswith("+PTX") and f"compute_{source}" not in codes[source]:
            codes[source].append(f"compute_{source}")
    return [f"-gencode=arch=compute_{source},code=[{','.join(code)}]" for source, code in codes.items()]


def output_of(command: list[str]) -> str:
    """Standard output of `command`, "" if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def hash_of(directory: Path) -> str:
    """A short hash of all files under `directory`: what tells one build of the kernels from another."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(directory)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


@dataclass
class Step:
    """One command of the build: makes `output` out of `inputs`. Compilers write the headers they read to `depfile`."""

    command: list[str]
    inputs: list[Path]
    output: Path
    depfile: Path | None = None  # None: the step links, and runs after those that it links
    needs: list[Path] = field(default_factory=list)  # outputs of steps that must have run, as those of `inputs` have


def jobs() -> int:
    """Compilers to run at a time: MAX_JOBS, else one per core."""
    text = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not text.isdigit() or int(text) < 1:
        raise BuildError(f"MAX_JOBS is {text!r}; pass a positive number")
    return int(text)


def run_steps(steps: list[Step], directory: Path) -> None:
    """Run a build with ninja (only what changed), or without ninja all of it anew."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ninja = shutil.which("ninja", path=path)
    try:
        if ninja:
            write_if_changed(directory / "build.ninja", ninja_text(steps))
            subprocess.run([ninja, "-C", str(directory), "-j", str(jobs())], check=True)
            return
        with ThreadPoolExecutor(jobs()) as pool:
            for needing in (False, True):
                list(pool.map(_run, [step for step in steps if step.depfile and bool(step.needs) == needing]))
        for step in steps:
            if not step.depfile:
                _run(step)
    except subprocess.CalledProcessError as error:
        raise BuildError(
            "compiling failed, see the compiler's message above; RESNET_FUSED_CUDA=0 builds without CUDA, "
            "RESNET_FUSED_SKIP_COMPILE=1 without any compiler"
        ) from error


def _run(step: Step) -> None:
    say(f"making {step.output.name}")
    subprocess.run(step.command, check=True)


def ninja_text(steps: list[Step]) -> str:
    """The build as a ninja file."""
    lines = ["rule compile", "  command = $cmd", "  description = compiling $in", "  depfile = $dep", "  deps = gcc"]
    lines += ["rule link", "  command = $cmd", "  description = linking $out"]

    def escape(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    for step in steps:
        rule = "compile" if step.depfile else "link"
        inputs = [*map(escape, step.inputs), *(["|", *map(escape, step.needs)] if step.needs else [])]
        lines.append(f"build {escape(step.output)}: {rule} {' '.join(inputs)}")
        lines.append(f"  cmd = {shlex.join(step.command).replace('$', '$$')}")
        if step.depfile:
            lines.append(f"  dep = {escape(step.depfile)}")
    return "\n".join(lines) + "\n"
