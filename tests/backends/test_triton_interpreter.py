"""Run the suites of the Triton kernels and of chains made of them on CPU tensors, where Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
OLD = triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"


@pytest.mark.skipif(
    OLD, reason="the interpreter of Triton 3.6 needs numpy < 2.4; install either another Triton or numpy"
)
@pytest.mark.parametrize("name", ["triton_suite.py", "triton_chains.py", "triton_faults.py"])
def test_suite_in_the_interpreter(tmp_path, name):
    suite = Path(__file__).with_name(name)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "error::RuntimeWarning",
        str(suite),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout and "skipped" not in ran.stdout, ran.stdout[-2000:]
