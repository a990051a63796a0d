"""Work in a thread that can be cancelled. At exit, Python waits for concurrent.futures' threads but not for it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future
from threading import TIMEOUT_MAX, Thread
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
