"""README says what is recorded and declared, and its example runs."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_tables_are_up_to_date():
    script = ROOT / "benchmarks" / "readme_tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, "run `python benchmarks/readme_tables.py`\n" + done.stderr


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    small = code.replace("torch.randn(16, 3, 224, 224)", "torch.randn(2, 3, 64, 64)")
    assert small != code
    done = subprocess.run([sys.executable, "-c", small], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "17 modules fused, 0 left stock" in done.stdout
