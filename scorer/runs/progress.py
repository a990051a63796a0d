"""How long work reports its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a run: messages, and records and tokens as they are done."""

    def say(self, message: str) -> None: ...
    def begin(self, records: int, done: int) -> None: ...
    def advance(self, records: int, tokens: int) -> None: ...


class Silent:
    """Reports nothing."""

    def say(self, message: str) -> None:
        pass

    def begin(self, records: int, done: int) -> None:
        pass

    def advance(self, records: int, tokens: int) -> None:
        pass
