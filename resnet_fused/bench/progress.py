"""One bar for the whole run, with the time left; plain lines where no terminal watches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Bar:
    """Progress over parts of known relative length, on stderr.

    Args:
        parts: name -> expected seconds. Only their proportions matter: the time left comes from the time spent.
    """

    def __init__(self, parts: Mapping[str, float], console: Console | None = None) -> None:
        self.parts = dict(parts)
        self.console = console or Console(stderr=True)
        self.done = 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.progress = Progress(
            *columns,
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            speed_estimate_period=120,
        )
        self.task = self.progress.add_task("starting", total=sum(self.parts.values()))

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Callable[[float], None]]:
        """Within the block the bar shows `name`; call what it yields with the fraction of this part that is done."""
        if self.progress.disable:
            self.say(f"{name} ...")
        self.progress.update(self.task, description=name)
        yield lambda fraction: self.progress.update(self.task, completed=self.done + fraction * self.parts[name])
        self.done += self.parts[name]
        self.progress.update(self.task, completed=self.done)
