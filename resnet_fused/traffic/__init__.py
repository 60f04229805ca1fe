"""What a plan moves, saves and launches, beside stock and ``torch.compile``: counted on fake tensors."""

from .explain import Explanation, explain

__all__ = ["Explanation", "explain"]
