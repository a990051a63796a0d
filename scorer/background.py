"""Work in a thread that can be cancelled, and the handing over of its results one by one.

At exit, Python waits for concurrent.futures' threads, but not for these.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import TIMEOUT_MAX, Condition, Thread
from traceback import clear_frames
from typing import Any, Generic, TypeVar

T = TypeVar("T")
STOP_SECONDS = 30.0  # Ray Data takes two to stop, and more on a busy machine


class Background(Generic[T]):
    """One call in a thread, begun at once."""

    def __init__(self, work: Callable[..., T], *arguments: Any):
        self._done: Future[T] = Future()

        def run() -> None:
            try:
                self._done.set_result(work(*arguments))
            except BaseException as error:  # noqa: BLE001 (raised where the result is asked for)
                clear_frames(error.__traceback__)  # closes the generators that it was at
                self._done.set_exception(error)

        self._thread = Thread(target=run, daemon=True, name="scorer-background")
        self._thread.start()

    def result(self) -> T:
        """Wait for the call, and return or raise what it does."""
        # A wait without a limit ignores Ctrl-C once Polars has installed its signal handler.
        return self._done.result(TIMEOUT_MAX)

    def cancel(self, seconds: float = STOP_SECONDS) -> None:
        """Interrupt the call at its next Python instruction, and wait at most `seconds` for its end."""
        if self._thread.is_alive():
            thread, interrupt = ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, interrupt)
            self._thread.join(seconds)


class Feed(Generic[T]):
    """Items that one thread puts in and another takes out, in order.

    `put` waits while the items that nobody has taken are larger than `budget`; any size fits where there is none.
    """

    def __init__(self, budget: float):
        self._budget, self._held = budget, 0.0
        self._items: deque[tuple[T, float]] = deque()
        self._change = Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T, size: float = 0) -> None:
        """Add an item. Does nothing once the feed is closed."""
        with self._change:
            while self._items and self._held + size > self._budget and not self._closed:
                self._change.wait(TIMEOUT_MAX)
            self._items.append((item, size))
            self._held += size
            self._change.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """No item follows: that was all, or `error` broke it off."""
        with self._change:
            self._ended, self._error = True, error
            self._change.notify_all()

    @property
    def ended(self) -> bool:
        """Whether all items are taken, and no other follows."""
        with self._change:
            return self._ended and not self._items

    def raise_error(self) -> None:
        """Raise what broke the items off, if anything did."""
        if self._error is not None:
            raise self._error

    def take(self, *, wait: bool) -> T | None:
        """The next item, or None where there is none: none yet, or with `wait` none that follows."""
        with self._change:
            while wait and not self._items and not self._ended:
                self._change.wait(TIMEOUT_MAX)
            if not self._items:
                return None
            item, size = self._items.popleft()
            self._held -= size
            self._change.notify_all()
            return item

    def close(self) -> None:
        """Let whoever puts items in go on: nobody takes them."""
        with self._change:
            self._closed = True
            self._change.notify_all()
