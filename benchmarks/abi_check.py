"""Check the promise of the stable ABI: libraries built against one torch run under another.

``python benchmarks/abi_check.py --other PYTHON`` takes the libraries that are built in this source tree (by the
interpreter that runs this script) and runs the compiled ops with PYTHON, whose torch is another one. Both must be of
one Python version, since ``_C`` is a Python module. Prints what was checked; exits 1 at the first broken promise.

Where PYTHON has a CUDA build and pytest, it also runs the tests of the plan on tensors of a GPU, which need no GPU but
such a build.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ON_CUDA = "tests/convert/test_cuda_plan.py"
CASES = 12  # of each op: tests/ops runs them all, under one torch


def check_here() -> dict:
    """Run every compiled op on the CPU and look up its CUDA kernel, under the torch of this interpreter."""
    import torch

    from resnet_fused import library
    from resnet_fused.backends import backends
    from resnet_fused.testing import cases, check

    status = library.status()
    if not status.cpu.loaded:
        raise SystemExit(f"_C is not loaded: {status.cpu.reason}")
    for name in library.CPU_OPS:
        ran = [
            case.name
            for case in cases(name, torch.float32)[:CASES]
            if not check(backends()["cpu"], name, case, torch.float32, torch.device("cpu"))
        ]
        if not ran:
            raise SystemExit(f"{name}: no case ran")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    on_cuda = [name for name in library.COMPILED_OPS if has_kernel(f"resnet_fused::{name}", "CUDA")]
    return {
        "torch": status.torch,
        "built_against": status.build_info["torch"],
        "cpu_ops": list(library.CPU_OPS),
        "cuda": "loaded" if status.cuda.loaded else status.cuda.reason,
        "cuda_build": torch.version.cuda,
        "cuda_library": status.cuda.path,
        "cuda_ops": on_cuda,
        "gpu": torch.cuda.is_available(),
        "pytest": importlib.util.find_spec("pytest") is not None,
    }


def last_line(python: str, *arguments: str) -> str:
    """What another interpreter prints last; SystemExit with all that it printed if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([python, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    if result.returncode:
        raise SystemExit(f"{python} failed:\n{result.stdout}{result.stderr}")
    return result.stdout.splitlines()[-1]


def check_under(python: str) -> dict:
    """Run :func:`check_here` in a subprocess of another interpreter."""
    return json.loads(last_line(python, __file__, "--report"))


def check_plan(python: str, report: dict) -> None:
    """Run the tests that need a CUDA build, where `python` has what they need."""
    if not report["cuda_build"] or not report["pytest"]:
        lacks = "pytest" if report["cuda_build"] else "CUDA"
        print(f"{ON_CUDA}: not run, {python} has no {lacks}")
        return
    print(f"{ON_CUDA}: {last_line(python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', ON_CUDA)}")


def print_report(report: dict) -> None:
    print(f"torch {report['torch']}, library built against torch {report['built_against']}")
    print(f"  CPU: ran and agreed with the reference: {', '.join(report['cpu_ops'])}")
    kernels = f"; registered for CUDA: {', '.join(report['cuda_ops'])}" if report["cuda_ops"] else ""
    print(f"  CUDA library: {report['cuda']}{kernels}; GPU: {'yes' if report['gpu'] else 'none'}")


def audit() -> None:
    """Let torch-abi-audit, where it is installed, judge which symbols of torch the libraries use."""
    tool = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    if tool is None:
        print("torch-abi-audit: not installed, not run (`pip install torch-abi-audit`)")
        return
    for library in sorted((ROOT / "resnet_fused").glob("*.so")):
        command = [tool, "--check", "torch", "--json", str(library)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{library.name} leaves the stable ABI of torch:\n{result.stdout}{result.stderr}")
        report = json.loads(result.stdout)
        for found in (entry["torch"] for entry in report["extensions"] + report["bundled_libs"]):
            print(
                f"torch-abi-audit: {library.name} uses {found['stable_shim_count']} stable symbols of torch, "
                f"{len(found['unstable_symbols'])} others; needs torch >= {found['min_torch_version']}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", metavar="PYTHON", help="interpreter with another torch")
    parser.add_argument("--report", action="store_true", help="check this interpreter only and print JSON")
    args = parser.parse_args()
    if args.report:
        print(json.dumps(check_here()))
        return
    if args.other is None:
        parser.error("pass --other PYTHON, an interpreter with another torch")
    reports = [check_under(sys.executable), check_under(args.other)]
    for report in reports:
        print_report(report)
    here, other = reports
    if here["torch"] == other["torch"]:
        raise SystemExit(f"both interpreters have torch {here['torch']}; pass one with another torch")
    if other["cuda_build"] and other["cuda_library"] and not other["cuda_ops"]:
        raise SystemExit(f"the CUDA library did not register its kernels: {other['cuda']}")
    check_plan(args.other, other)
    audit()


if __name__ == "__main__":
    main()
