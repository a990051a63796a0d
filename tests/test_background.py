"""Work in a thread of its own: its result, its error, its end before it is done, and what it hands over."""

from __future__ import annotations

import subprocess
import sys
import time
from threading import Event

import pytest

from scorer.background import Background, Feed


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


def test_items_come_in_order_and_wait_for_room() -> None:
    feed: Feed[str] = Feed(10)
    assert feed.take(wait=False) is None

    def fill() -> None:
        for item, size in (("huge", 50), ("six", 6), ("four", 4), ("one", 1)):
            feed.put(item, size)
            put.append(item)
        feed.end()

    put: list[str] = []
    filling = Background(fill)
    assert _comes_to(put, ["huge"])  # the next one does not fit beside it
    assert feed.take(wait=True) == "huge"
    assert _comes_to(put, ["huge", "six", "four"])
    assert [feed.take(wait=True) for _ in range(3)] == ["six", "four", "one"]
    filling.result()
    assert feed.take(wait=True) is None
    assert feed.ended
    feed.raise_error()


def test_an_error_comes_after_the_items() -> None:
    feed: Feed[int] = Feed(1)
    feed.put(7)
    feed.end(ValueError("broken off"))
    assert not feed.ended
    assert (feed.take(wait=True), feed.take(wait=True)) == (7, None)
    with pytest.raises(ValueError, match="broken off"):
        feed.raise_error()


def test_a_closed_feed_holds_nobody_back() -> None:
    feed: Feed[int] = Feed(1)
    feed.put(1, 1)
    waiting = Background(feed.put, 2, 1)
    time.sleep(0.05)
    feed.close()
    waiting.result()


def _comes_to(found: list[str], expected: list[str]) -> bool:
    latest = time.monotonic() + 30
    while found != expected and time.monotonic() < latest:
        time.sleep(0.01)
    time.sleep(0.05)  # in which no more come
    return found == expected
