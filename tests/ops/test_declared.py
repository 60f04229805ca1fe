"""Files are found by what they are called, and what an op declares is what the sources hold."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from resnet_fused.backends import triton as room
from resnet_fused.ops import OPS

ROOT = Path(__file__).parents[2]
PACKAGE, CSRC = ROOT / "resnet_fused", ROOT / "csrc"
SHARED = {"__init__", "activation", "contract", "lazy"}
COMPILED = {name for name, op in OPS.items() if op.compiled}

pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="not in the source tree")


def stems(folder, pattern):
    return {path.stem for path in folder.glob(pattern)}


def test_every_file_of_an_op_is_imported():
    assert {name.removesuffix("_") for name in OPS} == stems(PACKAGE / "ops", "*.py") - SHARED


def test_a_new_file_is_enough(tmp_path):
    """An op and its Triton kernel, each a file beside the others, are known to everyone who asks for ops."""
    package = tmp_path / "resnet_fused"
    package.mkdir()
    for path in PACKAGE.iterdir():
        if path.name not in ("ops", "backends") and not path.name.startswith("_C"):
            (package / path.name).symlink_to(path)
    for name, new in (("ops", "ops"), ("backends", "backends/triton")):
        for folder in [PACKAGE / name, *(PACKAGE / name).rglob("*/")]:
            (package / folder.relative_to(PACKAGE)).mkdir()
            for path in folder.glob("*.py"):
                (package / path.relative_to(PACKAGE)).symlink_to(path)
        (package / new / "twice.py").write_text(OP if name == "ops" else "")
    code = """
    import torch
    from resnet_fused import backends
    from resnet_fused.ops import OPS
    assert "twice" in OPS and "twice" in backends.backends()["triton"].kernels
    assert backends.run("twice", torch.ones(1, 2, 1, 1)).tolist() == [[[[2]], [[2]]]]
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


OP = """
from .contract import define, nbytes

OP = define(
    "twice",
    "(Tensor x) -> Tensor y",
    reference=lambda x: 2 * x,
    fake=lambda x: x.new_empty(x.shape),
    bytes=lambda x: 2 * nbytes(x),
    flops=lambda x: x.numel(),
)
"""


def test_compiled_ops_are_those_of_ops_cpp():
    defined = set(re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "ops.cpp").read_text()))
    assert defined - {"checksum", "new_batch", "empty_cache"} == COMPILED


@pytest.mark.parametrize("op", sorted({name.removesuffix("_") for name in COMPILED}))
def test_every_compiled_op_has_its_checks_in_a_file_of_its_own(op):
    assert f"check_{op}(" in (CSRC / "checks" / f"{op}.h").read_text()
    on_cpu = OPS.get(op, OPS.get(f"{op}_")).on_cpu
    sources = [*([CSRC / "cpu" / f"{op}.cpp"] if on_cpu else []), *(CSRC / "cuda").glob(f"{op}.cpp")]
    assert sources
    assert all(f'#include "../checks/{op}.h"' in path.read_text() for path in sources)


def test_cuda_kernels_are_compiled_apart_from_their_ops():
    """By nvcc, which would take minutes for torch's headers: see csrc/cuda/launches.h."""
    ops, kernels = stems(CSRC / "cuda", "*.cpp"), stems(CSRC / "cuda" / "kernels", "*.cu")
    assert ops - kernels == {"conv_chain", "conv_join", "conv_values"}  # which start the kernels of others
    assert kernels <= ops and not stems(CSRC / "cuda", "*.cu")


def test_triton_kernels_are_the_files_with_an_ops_name():
    assert set(room.OPS) == stems(PACKAGE / "backends" / "triton", "*.py") & set(OPS)


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.vectors])
def test_the_first_argument_of_an_op_on_vectors_is_one(op):
    """Which backends are asked for in the dtype of statistics."""
    schema = torch._C.parse_schema(op + OPS[op].schema)
    letters = dict(entry.split(":") for entry in OPS[op].forms.split())
    of = {name: form for names, form in letters.items() for name in names.split(",")}
    assert of[schema.arguments[0].name] == "C"
