"""Other people's models: fuse them in place, undo it, and say what was done."""

from .explain import Explanation, explain
from .fuse import Report, Row, fuse, report, unfuse
from .fused_module import stock_forward

__all__ = ["Explanation", "Report", "Row", "explain", "fuse", "report", "stock_forward", "unfuse"]
