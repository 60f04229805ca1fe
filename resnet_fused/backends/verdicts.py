"""What this process remembers of kernels that were checked."""

from __future__ import annotations


class Verdicts(dict):
    """Whatever was judged -> objection, "" for trusted; counts its changes, for those who derive from it."""

    changes = 0

    def __setitem__(self, key: tuple, objection: str) -> None:
        if self.get(key) != objection:
            self.changes += 1
        super().__setitem__(key, objection)

    def clear(self) -> None:
        self.changes += 1
        super().clear()
