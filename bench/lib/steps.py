"""Runs benchmarks one after another, each in a process of its own with a time limit, whatever becomes of the others."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench.lib.command import shown

TAIL = 4000  # characters of standard error that are kept of a step without a result
OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "timed out", "skipped"
StartProcess = Callable[..., BaseProcess]  # the Process of a context of multiprocessing


@dataclass(frozen=True, slots=True)
class Step:
    """A benchmark's command line, without `python -m bench`, and the seconds that it may take.

    without: why it can't run here, where that is known beforehand. parse: only see whether the command line is valid.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    without: str | None = None
    parse: bool = False


def run_step(step: Step, start: StartProcess, left: float) -> dict[str, Any]:
    """What became of a step that may take `left` seconds at most: status, exit code, result or standard error."""
    about: dict[str, Any] = {
        "name": step.name,
        "command": shown(step.command),
        "environment": dict(step.environment),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "limit_seconds": step.limit,
    }
    if step.without is not None:
        return about | {"status": SKIPPED, "why": step.without}
    if left <= 0:
        return about | {"status": SKIPPED, "why": "no time is left"}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start(target=_work, args=(step, out, err))
        began = time.monotonic()
        process.start()
        process.join(min(step.limit, left))
        running = process.is_alive()
        _kill_group(process)  # also what an ended step left behind, which would hold the device's memory
        process.join()
        about["seconds"] = round(time.monotonic() - began, 2)
        code = process.exitcode
        process.close()
        assert code is not None
        result, errors = _result(out), err.read_text(errors="replace") if err.exists() else ""
    done = code == 0 and (result is not None or step.parse)
    about["status"] = TIMED_OUT if running else OK if done else FAILED
    about["exit_code"] = None if running else code if code >= 0 else 128 - code  # as a shell counts signals
    if about["status"] != OK:
        about["stderr"] = errors[-TAIL:]
    return about | ({} if result is None else {"result": result})


def _work(step: Step, out: Path, err: Path) -> None:
    """The process of a step."""
    os.setsid()  # a group of its own, with all that it starts
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ |= {"TMPDIR": str(out.parent), **step.environment}  # weights go when the step has ended, killed or not
    tempfile.tempdir = None  # read TMPDIR again
    from bench.__main__ import bench, main

    sys.argv = ["bench", *step.command]
    if step.parse:
        bench.commands[step.command[0]].make_context(step.command[0], list(step.command[1:]))
        return
    main()


def _kill_group(process: BaseProcess) -> None:
    assert process.pid is not None
    with suppress(ProcessLookupError):  # nothing is left, or it has not come to its setsid
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _result(out: Path) -> dict[str, Any] | None:
    """The report, which a benchmark prints last, unless vLLM logs as it ends; None where there is none."""
    lines = out.read_text(errors="replace").splitlines() if out.exists() else []
    found = next((line for line in reversed(lines) if line.startswith('{"benchmark": ')), None)
    return None if found is None else json.loads(found)
