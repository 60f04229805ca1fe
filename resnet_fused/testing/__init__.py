"""Cases, tolerances and comparison: shared by the tests, the benchmark and ``verify``."""

from .cases import SHAPES, cases
from .compare import check, poisoned_allocations

__all__ = ["SHAPES", "cases", "check", "poisoned_allocations"]
