"""Every way a build goes wrong gets one line that says what to do; what a build made is what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import build_support
from build_support import BuildError, Step
from resnet_fused import library
from resnet_fused.ops import OPS

ROOT = Path(__file__).parent.parent
KNOWN = {"7.5", "8.0", "8.6", "9.0", "10.0"}


def refuses(function, *args) -> str:
    """The one line that `function` ends the build with."""
    with pytest.raises(BuildError) as caught:
        function(*args)
    text = str(caught.value)
    assert text.startswith("resnet_fused: ") and "\n" not in text
    return text


@pytest.fixture
def no_tools(monkeypatch, tmp_path):
    """A machine with an empty PATH, and none of the switches set."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDA_HOME", "RESNET_FUSED_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    real = shutil.which
    monkeypatch.setattr(
        build_support.shutil, "which", lambda name, **kw: None if str(name).startswith("/usr") else real(name, **kw)
    )
    return tmp_path


def script(directory: Path, name: str, output: str) -> Path:
    """An executable that prints `output`."""
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


def test_no_torch(monkeypatch):
    monkeypatch.setattr(build_support, "find_spec", lambda name: None)
    assert "pip install --no-build-isolation ." in refuses(build_support.find_torch)


def test_torch_too_old():
    assert "torch 2.9.1+cpu is too old" in refuses(build_support.check_torch, "2.9.1+cpu")
    assert "pip install 'torch>=2.10'" in refuses(build_support.check_torch, "1.13.0")
    for version in ("2.10.0", "2.13.0+cpu", "2.11.0a0+gitabc", "3.0.0"):
        build_support.check_torch(version)


def test_torch_is_found():
    version, directory = build_support.find_torch()
    assert version == torch.__version__
    assert (directory / "include/torch/csrc/stable/library.h").exists()


def test_no_compiler(no_tools, monkeypatch):
    text = refuses(build_support.find_compiler)
    assert "apt install g++" in text and "RESNET_FUSED_SKIP_COMPILE=1" in text
    monkeypatch.setenv("CXX", "my-c++")
    assert "CXX names my-c++" in refuses(build_support.find_compiler)
    script(no_tools, "my-c++", "")
    assert build_support.find_compiler() == "my-c++"


def test_no_python_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(build_support.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "python3-dev" in refuses(build_support.check_python_headers)


def test_no_nvcc_is_fine_and_said(no_tools, capsys):
    assert build_support.find_nvcc() is None
    assert "no nvcc found" in capsys.readouterr().out


def test_nvcc_demanded_but_missing(no_tools, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_CUDA", "1")
    assert "RESNET_FUSED_CUDA=1 but no nvcc found" in refuses(build_support.find_nvcc)
    script(no_tools, "nvcc", "Cuda compilation tools, release 11.8, V11.8.89")
    assert "nvcc 11.8 is older than 12.0" in refuses(build_support.find_nvcc)


def test_nvcc_is_found_in_cuda_home_or_refused(no_tools, monkeypatch, capsys):
    (no_tools / "cuda/bin").mkdir(parents=True)
    nvcc = script(no_tools / "cuda/bin", "nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(no_tools / "cuda"))
    assert build_support.find_nvcc() == str(nvcc)
    monkeypatch.setenv("RESNET_FUSED_CUDA", "0")
    assert build_support.find_nvcc() is None
    assert "without CUDA kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "architectures"),
    [
        (None, ["8.0", "9.0", "10.0+PTX"]),
        ("", ["8.0", "9.0", "10.0+PTX"]),
        ("7.5", ["7.5"]),
        ("8.0;9.0a+PTX", ["8.0", "9.0a+PTX"]),
        ("8.0 8.6, 9.0", ["8.0", "8.6", "9.0"]),
    ],
)
def test_cuda_architectures(wanted, architectures):
    assert build_support.cuda_architectures(KNOWN, wanted) == architectures


@pytest.mark.parametrize("wanted", ["Hopper", "8", "9.9", "8.0;12.0", "90"])
def test_unknown_cuda_architectures(wanted):
    text = refuses(build_support.cuda_architectures, KNOWN, wanted)
    assert "7.5 8.0 8.6 9.0 10.0" in text


@pytest.mark.parametrize(
    ("architectures", "flags"),
    [
        (["8.0", "9.0", "12.0+PTX"], ["arch=compute_80,code=[sm_80,sm_90,sm_120,compute_80]"]),
        (["9.0", "8.6"], ["arch=compute_86,code=[sm_90,sm_86]"]),
        (["8.0", "9.0a+PTX"], ["arch=compute_80,code=[sm_80]", "arch=compute_90a,code=[sm_90a,compute_90a]"]),
        (["7.5+PTX", "10.0"], ["arch=compute_75,code=[sm_75,compute_75]", "arch=compute_100,code=[sm_100]"]),
    ],
)
def test_gencode_flags(architectures, flags):
    assert build_support.gencode_flags(architectures) == [f"-gencode={each}" for each in flags]


@pytest.mark.parametrize("value", ["0", "many", "-2"])
def test_max_jobs(monkeypatch, value):
    monkeypatch.setenv("MAX_JOBS", value)
    assert "pass a positive number" in refuses(build_support.jobs)
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build_support.jobs() == 3


def copying_steps(directory: Path) -> list[Step]:
    """Compile a to b, which needs h, made of a; link b to c. `cp` plays the compiler. The directory has a space."""
    a, b, c, h = (directory / name for name in "abch")
    a.write_text("source")

    def copy(source: Path, target: Path) -> list[str]:
        return [
            "sh",
            "-c",
            f"cp '{source}' '{target}' && echo '{str(target).replace(' ', chr(92) + ' ')}:' > '{target}.d'",
        ]

    compiled = Step(copy(h, b), [a], b, directory / "b.d", needs=[h])
    return [compiled, Step(copy(a, h), [a], h, directory / "h.d"), Step(["cp", str(b), str(c)], [b], c)]


@pytest.mark.parametrize("ninja", [True, False])
def test_steps_run_in_order_with_and_without_ninja(tmp_path, monkeypatch, ninja):
    if not ninja:
        monkeypatch.setattr(build_support.shutil, "which", lambda *args, **kwargs: None)
    elif not shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        pytest.skip("needs ninja")
    directory = tmp_path / "a directory"
    directory.mkdir()
    build_support.run_steps(copying_steps(directory), directory)
    assert (directory / "c").read_text() == "source"
    assert (directory / "build.ninja").exists() == ninja


@pytest.mark.parametrize("ninja", [True, False])
def test_a_failing_compiler_ends_the_build(tmp_path, monkeypatch, ninja):
    if not ninja:
        monkeypatch.setattr(build_support.shutil, "which", lambda *args, **kwargs: None)
    source = tmp_path / "a"
    source.write_text("")
    steps = [Step(["false"], [source], tmp_path / "b", tmp_path / "b.d")]
    assert "compiling failed" in refuses(build_support.run_steps, steps, tmp_path)


def test_the_whole_of_setup_without_torch_is_one_line(tmp_path):
    """As under build isolation: an interpreter that has setuptools but no torch."""
    program = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "sys.argv = ['setup.py', 'build_ext']\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__name__': '__main__', '__file__': 'setup.py'})\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr.splitlines()[-1]


def test_skip_compile_has_nothing_to_compile():
    environment = {**os.environ, "RESNET_FUSED_SKIP_COMPILE": "1", "PATH": "", "CXX": "none"}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stderr


# What is built --------------------------------------------------------------------------------------------------

built = pytest.mark.skipif(not library.status().cpu.loaded, reason="the compiled library is not loaded")


@built
@pytest.mark.parametrize("name", library.COMPILED_OPS)
def test_compiled_schemas_are_those_of_the_contract(name):
    assert str(getattr(torch.ops.resnet_fused, name).default._schema) == f"resnet_fused::{name}{OPS[name].schema}"


@built
def test_build_info():
    info = library.status().build_info
    assert {"compiler", "flags", "torch", "nvcc", "nvcc_flags", "cuda_architectures", "git", "sources"} <= set(info)
    assert info["cpu_level"] in info["cpu_levels"].split()
    assert "-march=native" not in info["flags"]


@built
def test_libraries_keep_to_the_stable_abi():
    tool = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("needs torch-abi-audit")
    for path in (ROOT / "resnet_fused").glob("*.so"):
        result = subprocess.run([tool, "--check", "torch", str(path)], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
        assert "Min torch:   2.10.0" in result.stdout


@built
def test_every_cuda_launch_that_an_op_makes_is_compiled():
    """A linker leaves what a library lacks to others; nobody else has ours."""
    path, tool = ROOT / "resnet_fused/_cuda.so", shutil.which("nm")
    if tool is None or not path.exists():
        pytest.skip("needs binutils' nm, and the CUDA kernels")
    missing = subprocess.run([tool, "-uDC", str(path)], capture_output=True, text=True, check=True).stdout
    assert "resnet_fused" not in missing, missing


# What is loaded -------------------------------------------------------------------------------------------------


def test_a_missing_library_has_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(library, "_HERE", tmp_path)
    assert library._load_cpu()[0].reason.startswith("not built; run `pip install")
    (tmp_path / "_C.cpython-36m-x86_64-linux-gnu.so").touch()
    assert "built for another Python (_C.cpython-36m" in library._load_cpu()[0].reason


def test_a_library_that_does_not_load_has_a_reason(monkeypatch):
    def undefined(name):
        raise ImportError("_C.so: undefined symbol: torch_new_thing\nmore")

    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin="_C.so"))
    monkeypatch.setattr(library.importlib, "import_module", undefined)
    reason = library._load_cpu()[0].reason
    assert "undefined symbol: torch_new_thing; it needs torch >= 2.10" in reason and "\n" not in reason


@built
def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(library, "_compiled_schema", lambda name: "resnet_fused::bn_stats(Tensor old) -> Tensor")
    found, info = library._load_cpu()
    assert "built from other sources: bn_affine" in found.reason and not info


def test_cuda_library_has_a_reason(monkeypatch, tmp_path):
    loaded = library.Library("_C.so")
    monkeypatch.setattr(library, "_HERE", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in library._load_cuda(loaded).reason
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "put nvcc on PATH" in library._load_cuda(loaded).reason
    (tmp_path / "_cuda.so").write_text("no library")
    assert "_C, which is not loaded" in library._load_cuda(library.Library("", "not built")).reason
    assert "it needs torch >= 2.10" in library._load_cuda(loaded).reason
