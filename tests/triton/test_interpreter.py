"""Run the suites of the Triton kernels on CPU tensors, where Triton interprets.

Where there is a GPU, they are collected for it as well, see conftest.py.
"""

import pytest
from triton_processes import FOLDER, needs_interpreter, run_suites

#: The longest in a process of its own each, all others in one, as each process takes seconds to begin.
ALONE = ("suite_kernels.py", "suite_products.py")
OTHERS = tuple(sorted({path.name for path in FOLDER.glob("suite_*.py")} - {*ALONE}))


@needs_interpreter
@pytest.mark.parametrize("suites", [*((suite,) for suite in ALONE), OTHERS], ids=["kernels", "products", "others"])
def test_suites_in_the_interpreter(tmp_path, suites):
    said = run_suites(suites, tmp_path)
    assert " passed" in said and "skipped" not in said, said[-2000:]
