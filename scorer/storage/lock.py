"""One writer at a time: a lock on a disk, a lease in object storage. Knows nothing of what is written.

A disk's lock dies with its holder. A store has none, so there the holder writes its name and a time into an object and
renews it; a name whose time has passed, or whose process is known here to be dead, is replaced. Of two that replace one
at the same moment the later writer holds it, and the other sees so a second later, or where the later one's writing was
slow, before that one begins. Clocks may differ by less than `LEASE_SECONDS - RENEW_SECONDS`; if they differ more, two
writers do the same work twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from scorer.storage.paths import is_remote, store_errors
from scorer.types import ScorerError

LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0
SETTLE_SECONDS = 1.0
BOOT = Path("/proc/sys/kernel/random/boot_id")  # of this machine, until it starts again

Check = Callable[[], None]  # raises ScorerError where the lock was lost since


@contextmanager
def locked(lock: Path) -> Iterator[Check]:
    """Hold the lock file or object `lock` while the block runs. Raises ScorerError where another process does."""
    with _leased(lock) if is_remote(lock) else _flocked(lock) as check:
        yield check


def check_free(lock: Path) -> None:
    """Raise ScorerError where another process holds `lock` now."""
    if is_remote(lock):
        _check_holder_gone(lock)
    elif lock.exists():
        with lock.open() as file:
            _take(file, lock, fcntl.LOCK_SH)


def _held(lock: Path, by: str = "") -> ScorerError:
    return ScorerError(f"{lock.parent}: another process is writing this run{by}; wait for it or choose another")


@contextmanager
def _flocked(lock: Path) -> Iterator[Check]:
    with lock.open("w") as file:
        _take(file, lock, fcntl.LOCK_EX)
        yield lambda: None


def _take(file: IO[str], lock: Path, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(lock) from None


@contextmanager
def _leased(lock: Path) -> Iterator[Check]:
    token, ended, lost = uuid.uuid4().hex, threading.Event(), threading.Event()
    renewed = time.time()

    def renew() -> None:
        nonlocal renewed
        if _read(lock).get("token") != token:
            lost.set()
        else:
            _write(lock, token)
            renewed = time.time()

    def keep() -> None:
        while not lost.is_set() and not ended.wait(RENEW_SECONDS):
            with suppress(ScorerError, FileNotFoundError):  # a store that fails for a while: the writes themselves tell
                renew()

    def check() -> None:
        if time.time() - renewed > LEASE_SECONDS:  # this process, or the machine, slept
            renew()
        if lost.is_set():
            raise _held(lock, ", since this one could not renew its lease")

    _check_holder_gone(lock)
    thread = threading.Thread(target=keep, name="scorer-lease", daemon=True)
    try:
        began = time.monotonic()
        _write(lock, token)
        # One that looked before this appeared, and wrote its own meanwhile, has settled: it learns when it renews.
        slow = time.monotonic() - began > SETTLE_SECONDS / 2
        time.sleep(SETTLE_SECONDS + (RENEW_SECONDS if slow else 0))
        if (now := _read(lock)).get("token") != token:
            raise _held(lock, f" ({now.get('host')}, process {now.get('process')})")
        thread.start()
        yield check
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
        with suppress(ScorerError, FileNotFoundError):  # it runs out by itself
            if _read(lock).get("token") == token:
                _write(lock, None)


def _check_holder_gone(lock: Path) -> None:
    lease = _read(lock)
    if not lease.get("token"):
        return
    left = float(lease["until"]) - time.time()
    dead = (lease["host"], lease["processes"]) == (platform.node(), _processes()) and not _is_alive(lease["process"])
    if left > 0 and not dead:
        raise _held(lock, f" ({lease['host']}, process {lease['process']}; its lease ends in {left:.0f} s if it died)")


def _processes() -> str:
    """What tells one numbering of processes from another's: machines, and containers of one, may share a name."""
    with suppress(OSError):
        return BOOT.read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    return ""


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _read(lock: Path) -> dict[str, Any]:
    try:
        with store_errors(lock):
            lease = json.loads(lock.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # the latter: of a run that was copied from a disk, whose lock is empty
        return {}
    return lease if isinstance(lease, dict) and lease.keys() == _lease(None).keys() else {}


def _write(lock: Path, token: str | None) -> None:
    with store_errors(lock):
        lock.write_text(json.dumps(_lease(token)) + "\n", encoding="utf-8")


def _lease(token: str | None) -> dict[str, Any]:
    return {
        "token": token,
        "host": platform.node(),
        "processes": _processes(),
        "process": os.getpid(),
        "until": time.time() + LEASE_SECONDS,
    }
