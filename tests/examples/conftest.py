"""The examples import each other as scripts do, from the folder that they lie in."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
