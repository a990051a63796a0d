"""How long work reports its progress: to a terminal or notebook, as lines, or not at all."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from scorer.printing import printable

PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal


class PlainConsole(Console):
    """A console that shows any text as it is, [brackets] and :colons: too, and what can't be printed as an escape."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, alone or in a table, comes here."""
        return super().render_str(printable(text), **options)


console = PlainConsole(stderr=True)


class Progress(Protocol):
    """Receives the progress of a run: messages, and records and tokens as they are done."""

    def say(self, message: str) -> None: ...
    def begin(self, records: int, done: int) -> None: ...
    def advance(self, records: int, tokens: int) -> None: ...


class Silent:
    """Reports nothing."""

    def say(self, message: str) -> None: ...
    def begin(self, records: int, done: int) -> None: ...
    def advance(self, records: int, tokens: int) -> None: ...


def shown(progress: Progress | bool | None) -> AbstractContextManager[Progress]:
    """What receives progress while the block runs: `progress` itself; for True the console, for False nothing.

    None is True in a terminal or a notebook.
    """
    if progress is None:
        progress = console.is_terminal or console.is_jupyter
    if isinstance(progress, bool):
        return ConsoleProgress() if progress else nullcontext(Silent())
    return nullcontext(progress)


class ConsoleProgress(AbstractContextManager["ConsoleProgress"]):
    """Progress as a bar on a terminal, and elsewhere as a line every PLAIN_SECONDS."""

    def __init__(self) -> None:
        self.bar = RichProgress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("records  {task.fields[rates]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, message: str) -> None:
        """One line."""
        console.print(message, soft_wrap=True)

    def begin(self, records: int, done: int) -> None:
        """Start the bar at `done` of `records`."""
        if done:
            self.say(f"resuming after {done:,} of {records:,} records")
        self.records, self.done = records, done
        self.tokens = self.scored = 0
        self.began = self.printed = time.monotonic()
        for task in self.bar.task_ids:  # of the work before
            self.bar.remove_task(task)
        self.task = self.bar.add_task("", total=records, completed=done, rates="")
        self.bar.start()

    def advance(self, records: int, tokens: int) -> None:
        """Count more finished records, and their tokens."""
        self.done += records
        self.scored += records
        self.tokens += tokens
        now = time.monotonic()
        seconds = max(now - self.began, 1e-6)
        rates = f"{self.scored / seconds:,.1f} records/s"
        if self.tokens:
            rates += f"  {self.tokens / seconds:,.0f} tokens/s"
        self.bar.update(self.task, completed=self.done, rates=rates)
        if not console.is_terminal and now - self.printed >= PLAIN_SECONDS:
            self.printed = now
            left = (self.records - self.done) * seconds / max(self.scored, 1)
            self.say(f"{self.done:,} of {self.records:,} records  {rates}  {left:,.0f} s left")
