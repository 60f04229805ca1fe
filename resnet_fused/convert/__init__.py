"""Other people's models: fuse them in place, undo it, and say what was done."""

from .fuse import Report, Row, fuse, report, unfuse
from .fused_module import stock_forward

__all__ = ["Report", "Row", "fuse", "report", "stock_forward", "unfuse"]
