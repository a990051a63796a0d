"""What long work tells whoever watches it. Knows nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a run tells whoever watches it."""

    def say(self, message: str) -> None: ...
    def begin(self, records: int, done: int) -> None: ...
    def advance(self, records: int, tokens: int) -> None: ...


class Silent:
    """Tells nobody."""

    def say(self, message: str) -> None:
        pass

    def begin(self, records: int, done: int) -> None:
        pass

    def advance(self, records: int, tokens: int) -> None:
        pass
