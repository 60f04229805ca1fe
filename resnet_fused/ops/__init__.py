"""What each op means: formula, shapes, dtypes, reference, fake kernel, bytes and FLOPs. Nothing here runs a kernel.

Each file of this room defines its op when it is imported, and all of them are, here.
"""

import importlib
import pkgutil

from .contract import DATA_DTYPES, OPS, Op, stat_dtype

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_file.name}", __name__)

__all__ = ["DATA_DTYPES", "OPS", "Op", "stat_dtype"]
