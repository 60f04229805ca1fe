"""Other people's models: fuse them in place, undo it, and say what was done."""

from .forced import stock_forward
from .fuse import fuse, report, unfuse
from .report import Report, Row, Share

__all__ = ["Report", "Row", "Share", "fuse", "report", "stock_forward", "unfuse"]
