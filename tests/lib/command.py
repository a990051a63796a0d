"""The command `scorer` in real processes, forked from a server that has torch imported: a start takes no seconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from scorer import commands
from scorer.runs.directory import Run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.lib.preload"])
CONSOLE_SCRIPT = Path(sys.executable).with_name("scorer")
SECONDS = 600.0  # ten times what any process here takes on a busy machine


@dataclass(frozen=True)
class Ended:
    """An ended process: its exit code, and the text of its standard output and error."""

    code: int
    out: str
    err: str

    def line(self) -> str:
        """What a user who made a mistake is told: one line, and exit code 2."""
        assert self.code == 2, self
        assert self.out == "", self
        assert self.err.count("\n") == 1, self
        return self.err

    def usage_error(self) -> str:
        """What a user is told whose command line is wrong: the command's usage line, one line more, and exit code 2."""
        assert (self.code, self.out) == (2, ""), self
        usage, line = self.err.splitlines()
        assert usage.startswith("Usage: scorer"), self
        return line

    def done(self) -> str:
        """Standard error of a process that did what it was asked to."""
        assert self.code == 0, self
        assert "Traceback" not in self.err
        return self.err

    def shown(self) -> str:
        """Standard output of a process that did what it was asked to, and had nothing to say beside."""
        assert (self.code, self.err) == (0, ""), self
        return self.out


@dataclass(frozen=True)
class Running:
    process: BaseProcess
    stem: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def end(self) -> Ended:
        self.process.join(SECONDS)
        assert self.process.exitcode is not None, "still running"
        out, err = (self.stem.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        return Ended(self.process.exitcode, out, err)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> Ended:
        os.kill(self.pid, number)
        return self.end()


class Commands:
    """Starts the command with the arguments given, in the folder `path`, with `env` added to the environment."""

    def __init__(self, path: Path):
        self.path = path
        self.count = 0

    def start(self, *arguments: object, stdin: str = "", **env: str) -> Running:
        self.count += 1
        stem = self.path / f".process-{self.count}"
        for suffix, content in ((".in", stdin), (".out", ""), (".err", "")):
            stem.with_suffix(suffix).write_text(content, encoding="utf-8")
        process = FORKS.Process(target=_command, args=(list(map(str, arguments)), str(self.path), stem, env))
        process.start()
        return Running(process, stem)

    def __call__(self, *arguments: object, stdin: str = "", **env: str) -> Ended:
        return self.start(*arguments, stdin=stdin, **env).end()


def _command(arguments: list[str], folder: str, stem: Path, env: dict[str, str]) -> None:
    os.environ.update(env)
    os.chdir(folder)
    for descriptor, suffix, flags in ((0, ".in", os.O_RDONLY), (1, ".out", os.O_WRONLY), (2, ".err", os.O_WRONLY)):
        os.dup2(os.open(stem.with_suffix(suffix), flags), descriptor)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115 (lives as long as the process)
    sys.argv = ["scorer", *arguments]
    commands.main()


def start(folder: Path, *arguments: object, **env: str) -> subprocess.Popen[str]:
    """The installed command, as a shell starts it: with `env` in its environment before anything is imported."""
    return subprocess.Popen(
        [CONSOLE_SCRIPT, *map(str, arguments)],
        cwd=folder,
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> Ended:
    """Wait for what `start` gave."""
    out, err = process.communicate(timeout=SECONDS)
    return Ended(process.returncode, out, err)


def wait(condition: Callable[[], Any]) -> Any:
    """Until `condition` holds; returns what it gave then."""
    end = time.monotonic() + SECONDS
    while not (given := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)  # what is waited for needs the cores
    return given


def alive(process: psutil.Process) -> bool:
    """Neither ended nor a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def assert_gone(processes: list[psutil.Process]) -> None:
    """Until each has ended."""
    wait(lambda: not any(map(alive, processes)))


def shards(run: Path) -> int:
    """How many whole shards a run directory has."""
    return len(Run(run).shards())


def alpaca(count: int, seed: int = 0, words: int = 30) -> list[dict[str, Any]]:
    """Rows of random words, no two alike."""
    draw = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(
            "".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(draw.randint(3, most))
        )

    return [{"instruction": f"{i}: {text(words)}", "input": "", "output": text(words), "n": i} for i in range(count)]


def bash(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script of bash in a folder."""
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a JSON Lines file (`str.splitlines` would split at U+2028 too)."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
