"""Other people's models: fuse them in place, undo it, and say what was done."""

from .fuse import fuse, report, unfuse
from .fused_module import stock_forward
from .report import Report, Row, Share

__all__ = ["Report", "Row", "Share", "fuse", "report", "stock_forward", "unfuse"]
