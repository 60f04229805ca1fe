"""How tests of Triton run scripts and suites: for a whole process, Triton either interprets or compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import once
import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

FOLDER = Path(__file__).parents[1] / "triton"
SUPPORT = Path(__file__).parent

needs_interpreter = pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 needs numpy < 2.4; install either another Triton or numpy",
)


def run(names, options, cache, interpret):
    """Run files of tests/triton in Python with `options`, remembering nothing but in the folder `cache`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "XDG_CACHE_HOME": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SUPPORT), environment.get("PYTHONPATH")]))
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, *options, *(str(FOLDER / name) for name in names)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-4000:]
    return ran.stdout


def rows_of(script, cache, interpret=False):
    """The JSON rows that a script prints, one a line."""
    return [json.loads(line) for line in run([script], ("-W", "ignore"), cache, interpret).splitlines()]


def rows_for_all(script, tmp_path_factory, interpret=False):
    """As :func:`rows_of`, from one process for all tests of a session, in whichever of its processes they run."""

    def make(path):
        path.write_text(json.dumps(rows_of(script, tmp_path_factory.mktemp("triton"), interpret)))

    return json.loads(once.made(tmp_path_factory, f"{script}.json", make).read_text())


def run_suites(suites, cache):
    """Collect and run suites in the interpreter; what pytest said."""
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error::RuntimeWarning")
    return run(suites, options, cache, interpret=True)
