"""Build the compiled libraries: `_C` (schemas and CPU kernels) and, wherever nvcc is found, `_cuda.so` (CUDA kernels).

Environment: RESNET_FUSED_SKIP_COMPILE=1 installs pure Python; RESNET_FUSED_CUDA=0 never builds CUDA kernels, 1 demands
them; TORCH_CUDA_ARCH_LIST chooses their architectures; MAX_JOBS bounds parallel compilers; CXX and CXXFLAGS as usual,
NVCCFLAGS likewise.

The compilers are called directly, not through torch's CUDAExtension: that one refuses a CPU-only torch, and asks for a
GPU on machines that have none.
"""

import os
import shlex
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # PEP 517 front ends run this file without its directory on the path

from build_support import (  # noqa: E402
    KERNEL_FLAGS,
    Step,
    check_python_headers,
    cuda_architectures,
    cuda_headers,
    find_compiler,
    find_nvcc,
    find_torch,
    gencode_flags,
    hash_of,
    known_architectures,
    nvcc_version,
    output_of,
    run_steps,
    write_if_changed,
)

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # of torch 2.10; every later torch keeps it
# No -march: csrc/cpu_levels.h compiles the loops for several levels. No -ffast-math: NaN and -0.0 must pass.
CXX_FLAGS = shlex.split("-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra")
NVCC_FLAGS = [*KERNEL_FLAGS, *shlex.split("-Xcompiler=-fPIC,-fvisibility=hidden,-Wall -DUSE_CUDA")]


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def nvcc_flags() -> list[str]:
    return [*NVCC_FLAGS, *shlex.split(os.environ.get("NVCCFLAGS", ""))]


class Build(build_ext):
    """Plans and runs the compiler commands; setuptools decides only where the results go."""

    def build_extensions(self) -> None:
        self.torch_version, torch_dir = find_torch()
        self.compiler_name = find_compiler()
        self.includes = ["-isystem", str(torch_dir / "include"), "-isystem", check_python_headers()]
        # libtorch.so alone pulls the CUDA half of torch into scope, and nothing refers to it by symbol: hence
        # --no-as-needed. Found at run time because torch is imported first.
        self.link_flags = [f"-L{torch_dir / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch"]
        self.nvcc = find_nvcc()
        # Not build_temp, which is a new directory for every editable install: there would be nothing to reuse.
        directory = ROOT / "build" / f"{self.plat_name}-{sys.implementation.cache_tag}"
        directory.mkdir(parents=True, exist_ok=True)
        steps = self.cpu_steps(directory)
        if self.nvcc:
            steps = [*self.cuda_steps(directory), *steps]  # those that take longest begin first
        else:
            self.extensions = [ext for ext in self.extensions if ext.name != "resnet_fused._cuda"]
            if self.editable_mode:  # one of an earlier build would be loaded beside the new _C
                (ROOT / "resnet_fused/_cuda.so").unlink(missing_ok=True)
        run_steps(steps, directory)

    def get_ext_filename(self, fullname: str) -> str:
        # _cuda is no Python module: torch.ops.load_library opens it, under one name for every Python
        name = super().get_ext_filename(fullname)
        return str(Path(name).with_name("_cuda.so")) if fullname.endswith("_cuda") else name

    def cpu_steps(self, directory: Path) -> list[Step]:
        flags = [*CXX_FLAGS, STABLE_ABI, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        architectures = self.architectures() if self.nvcc else []
        facts = {
            "compiler": output_of([self.compiler_name, "--version"]).partition("\n")[0],
            "flags": " ".join(flags),
            "torch": self.torch_version,
            "nvcc": nvcc_version(self.nvcc) if self.nvcc else "",
            "nvcc_flags": shlex.join(nvcc_flags()) if self.nvcc else "",
            "cuda_architectures": " ".join(architectures),
            "git": output_of(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]) or "unknown",
            "sources": hash_of(ROOT / "csrc"),
        }
        lines = [f'{{"{name}", R"({value})"}},\n' for name, value in facts.items()]
        write_if_changed(directory / "build_facts.inc", "".join(lines))
        command = [self.compiler_name, *flags, *self.includes, f"-I{directory}"]
        steps = self.steps("resnet_fused._C", {".cpp": command}, [self.compiler_name, "-shared"], directory)
        return self.precompiled(command, directory, steps)

    def precompiled(self, command: list[str], directory: Path, steps: list[Step]) -> list[Step]:
        """`steps`, of which those of `command` read csrc/precompiled.h once for all, if GCC compiles them.

        GCC takes `precompiled.h.gch` for `precompiled.h`, which is there should it not do so.
        """
        if "Free Software Foundation" not in output_of([self.compiler_name, "--version"]):
            return steps
        header = directory / "precompiled.h"
        write_if_changed(header, f'#include "{ROOT / "csrc" / "precompiled.h"}"\n')
        target, depfile = header.with_suffix(".h.gch"), header.with_suffix(".d")
        make = [*command, "-MD", "-MF", str(depfile), "-x", "c++-header", str(header), "-o", str(target)]
        for step in steps:
            if step.command[: len(command)] == command:
                step.command[1:1] = ["-include", str(header)]
                step.needs.append(target)
        return [Step(make, [header], target, depfile), *steps]

    def cuda_steps(self, directory: Path) -> list[Step]:
        flags = [*nvcc_flags(), STABLE_ABI, *gencode_flags(self.architectures())]
        nvcc = [self.nvcc, f"-ccbin={self.compiler_name}"]
        headers = cuda_headers(self.nvcc)
        around = [self.compiler_name, *CXX_FLAGS, "-DUSE_CUDA", STABLE_ABI, *self.includes, "-isystem", headers]
        commands = {".cu": [*nvcc, *flags], ".cpp": around}
        return self.steps("resnet_fused._cuda", commands, [*nvcc, "-shared", "-cudart=static"], directory, "cuda.cpp")

    def architectures(self) -> list[str]:
        return cuda_architectures(known_architectures(self.nvcc), os.environ.get("TORCH_CUDA_ARCH_LIST"))

    def steps(
        self, name: str, commands: dict[str, list[str]], link_command: list[str], directory: Path, joined: str = ""
    ) -> list[Step]:
        """One step for every source of the extension `name`, by how it ends, and one that links them.

        `joined`: a file that includes all C++ sources and is compiled instead, which reads headers and instantiates
        templates once for all.
        """
        sources = next(ext.sources for ext in self.extensions if ext.name == name)
        if joined:
            lines = [f'#include "{ROOT / source}"\n' for source in sources if source.endswith(".cpp")]
            write_if_changed(directory / joined, "".join(lines))
            sources = [*(source for source in sources if not source.endswith(".cpp")), str(directory / joined)]
        library = Path(self.get_ext_fullpath(name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        compiles = []
        for source in sources:
            stem = source.removeprefix(f"{directory}/").replace("/", "-")
            target = directory / f"{stem}.o"
            depfile = target.with_suffix(".d")
            command = [*commands[Path(source).suffix], "-MD", "-MF", str(depfile)]
            command += ["-c", str(ROOT / source), "-o", str(target)]
            compiles.append(Step(command, [ROOT / source], target, depfile))
        objects = [step.output for step in compiles]
        link = [*link_command, *map(str, objects), "-o", str(library), *self.link_flags]
        return [*compiles, Step(link, objects, library)]


if __name__ == "__main__":
    skip = os.environ.get("RESNET_FUSED_SKIP_COMPILE") == "1"
    libraries = {
        "_C": [*sources("*.cpp"), *sources("cpu/*.cpp")],
        "_cuda": [*sources("cuda/kernels/*.cu"), *sources("cuda/*.cpp")],
    }
    setup(
        ext_modules=[] if skip else [Extension(f"resnet_fused.{name}", files) for name, files in libraries.items()],
        cmdclass={"build_ext": Build},
    )
