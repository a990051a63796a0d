"""One writer at a time: a lock on a disk, a lease in object storage.

The lock of a disk ends with the process that holds it. Object storage has no such lock, so the holder writes an object
with its name and a time, and renews it. Another process may replace a lease whose time has passed, or whose process is
known to be dead. If two replace it at the same moment, the later writer holds it, and the other one notices: a second
later, or when it renews if the later write was slow. Clocks may differ by up to `LEASE_SECONDS - RENEW_SECONDS`; beyond
that, two writers do the same work twice.
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
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from scorer.storage.paths import is_remote, store_errors
from scorer.types import ScorerError

LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0
SETTLE_SECONDS = 1.0
FIELDS = ("token", "host", "processes", "process", "until")  # of a lease
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Check = Callable[[], None]  # raises ScorerError if the lock was lost


def locked(lock: Path) -> AbstractContextManager[Check]:
    """Hold the lock file or object `lock` while the block runs. Raises ScorerError if another process holds it."""
    return _leased(lock) if is_remote(lock) else _flocked(lock)


def check_free(lock: Path) -> None:
    """Raise ScorerError if another process holds `lock` now."""
    if is_remote(lock):
        _check_holder_gone(lock)
    elif lock.exists():
        with _flocked(lock, os.O_RDONLY, fcntl.LOCK_SH):
            pass


def _held(lock: Path, holder: str = "") -> ScorerError:
    return ScorerError(f"{lock.parent}: another process is writing this run{holder}; wait for it or choose another")


@contextmanager
def _flocked(lock: Path, flags: int = os.O_RDWR | os.O_CREAT, kind: int = fcntl.LOCK_EX) -> Iterator[Check]:
    # Not through a link, whose target is not ours; nor waiting, as opening a pipe may.
    descriptor = os.open(lock, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        yield lambda: None
    except BlockingIOError:
        raise _held(lock) from None
    finally:
        os.close(descriptor)


class _Lease:
    def __init__(self, lock: Path):
        self.lock, self.token, self.renewed = lock, uuid.uuid4().hex, time.time()
        self.ended, self.lost = threading.Event(), threading.Event()

    def acquire(self) -> None:
        began = time.monotonic()
        _write(self.lock, self.token)
        # A process that looked before this write and wrote meanwhile considers itself the holder until it renews.
        slow = time.monotonic() - began > SETTLE_SECONDS / 2
        time.sleep(SETTLE_SECONDS + (RENEW_SECONDS if slow else 0))
        if (now := _read(self.lock)).get("token") != self.token:
            raise _held(self.lock, f" ({now.get('host')}, process {now.get('process')})")

    def renew(self) -> None:
        if _read(self.lock).get("token") != self.token:
            self.lost.set()
        else:
            _write(self.lock, self.token)
            self.renewed = time.time()

    def keep_renewing(self) -> None:
        while not self.lost.is_set() and not self.ended.wait(RENEW_SECONDS):
            with suppress(ScorerError, FileNotFoundError):  # if the store fails for long, the writer's own writes fail
                self.renew()

    def check(self) -> None:
        if time.time() - self.renewed > LEASE_SECONDS:  # the process or the machine was suspended
            self.renew()
        if self.lost.is_set():
            raise _held(self.lock, ", since this one could not renew its lease")

    def release(self) -> None:
        with suppress(ScorerError, FileNotFoundError):  # the lease expires by itself
            if _read(self.lock).get("token") == self.token:
                _write(self.lock, None)


@contextmanager
def _leased(lock: Path) -> Iterator[Check]:
    _check_holder_gone(lock)
    lease = _Lease(lock)
    thread = threading.Thread(target=lease.keep_renewing, name="scorer-lease", daemon=True)
    try:
        lease.acquire()
        thread.start()
        yield lease.check
    finally:
        lease.ended.set()
        if thread.ident is not None:
            thread.join()
        lease.release()


def _check_holder_gone(lock: Path) -> None:
    lease = _read(lock)
    if not lease.get("token"):
        return
    left, host, process = float(lease["until"]) - time.time(), lease["host"], lease["process"]
    dead = (host, lease["processes"]) == (platform.node(), _processes()) and not _is_alive(process)
    if left > 0 and not dead:
        raise _held(lock, f" ({host}, process {process}; its lease ends in {left:.0f} s if it died)")


def _processes() -> str:
    """Identifies the process namespace: several machines or containers may have the same host name."""
    with suppress(OSError):  # not on Linux
        return BOOT_ID.read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
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
    except (FileNotFoundError, ValueError):  # ValueError: the empty lock file of a run that was copied from a disk
        return {}
    return lease if isinstance(lease, dict) and lease.keys() == set(FIELDS) else {}


def _write(lock: Path, token: str | None) -> None:
    values = (token, platform.node(), _processes(), os.getpid(), time.time() + LEASE_SECONDS)
    with store_errors(lock):
        lock.write_text(json.dumps(dict(zip(FIELDS, values, strict=True))) + "\n", encoding="utf-8")
