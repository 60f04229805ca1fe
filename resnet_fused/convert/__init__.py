"""Other people's models: fuse them in place, undo it, and say what was done."""

from .explain import Explanation, explain
from .fuse import fuse, report, unfuse
from .fused_module import stock_forward
from .report import Report, Row, Share

__all__ = ["Explanation", "Report", "Row", "Share", "explain", "fuse", "report", "stock_forward", "unfuse"]
