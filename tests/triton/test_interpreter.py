"""Run the suites of the Triton kernels on CPU tensors, where Triton interprets.

Where there is a GPU, they are collected for it as well, see conftest.py.
"""

import pytest
from triton_processes import FOLDER, needs_interpreter, run_suite


@needs_interpreter
@pytest.mark.parametrize("suite", sorted(path.name for path in FOLDER.glob("suite_*.py")))
def test_suite_in_the_interpreter(tmp_path, suite):
    said = run_suite(suite, tmp_path)
    assert " passed" in said and "skipped" not in said, said[-2000:]
