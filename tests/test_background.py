"""Work in a thread of its own: its result, its error, and its end before it is done."""

from __future__ import annotations

import subprocess
import sys
import time
from threading import Event

import pytest

from scorer.background import Background


def test_what_it_returns_and_raises() -> None:
    assert Background(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        Background(divmod, 7, 0).result()


def test_work_that_is_given_up_ends() -> None:
    begun = Event()

    def work() -> None:
        begun.set()
        while True:
            time.sleep(0.01)

    task = Background(work)
    begun.wait()
    task.cancel()
    with pytest.raises(SystemExit):
        task.result()
    task.cancel()  # of what has ended: nothing


def test_a_process_ends_without_it() -> None:
    """Here the work is in a call that blocks, as when it waits for an answer."""
    code = "import threading; from scorer.background import Background; Background(threading.Event().wait).cancel(0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
