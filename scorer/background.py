"""Work in a thread of its own that can be given up. Knows nothing of the work.

Those of concurrent.futures are waited for when a process ends, whatever they wait for themselves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future
from threading import TIMEOUT_MAX, Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")
STOP_SECONDS = 30.0  # for Ray Data to stop it takes two, and more on a busy machine


class Background(Generic[T]):
    """One call, begun at once."""

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
        """What the call returns, once it does. Raises what it raises."""
        # A wait without a limit goes on after a Ctrl-C: Polars' handler of it asks the system for that.
        return self._done.result(TIMEOUT_MAX)

    def cancel(self, seconds: float = STOP_SECONDS) -> None:
        """Interrupt the call at its next step in Python, if it has not ended, and wait at most so long for its end."""
        if self._thread.is_alive():
            thread, interrupt = ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, interrupt)
            self._thread.join(seconds)
