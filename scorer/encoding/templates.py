"""Chat templates, rendered in a process of their own, which the kernel holds to limits of time and memory."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from scorer.encoding.template_process import SIZE
from scorer.types import EngineError

SECONDS = 10  # of computing, for one rendering: a conversation of several MB takes a hundredth
PROCESS = Path(__file__).with_name("template_process.py")
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)  # such as recursion outside of Python


class ChatTemplateError(ValueError):
    """A template gives no text for a conversation."""


class EndlessTemplateError(ChatTemplateError):
    """A template computes longer than it may."""


class Renderer:
    """The process that renders, started when it is needed, and again after a template ended it."""

    def __init__(self, seconds: int = SECONDS):
        self._lock, self._seconds = Lock(), seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text of a template. Raises ChatTemplateError where it has none, EngineError where the process was killed.

        variables: anything that can be pickled.
        """
        try:
            request = pickle.dumps((source, dict(variables)))
        except Exception as error:  # what a record holds may be anything
            raise ChatTemplateError(f"{type(error).__name__}: {error}") from error
        with self._lock:
            try:
                flag, text = self._exchange(request)
            except BaseException:  # an answer that nobody has read would be taken for the next one
                self._stop()
                raise
        if flag != b"1":
            raise ChatTemplateError(text)
        return text

    def _exchange(self, request: bytes) -> tuple[bytes, str]:
        if self._process is None or self._owner != os.getpid():  # pipes that a fork shares are its parent's
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(PROCESS), str(self._seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C does not reach it: what it was at would look like a template's fault
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it ended: see below
            process.stdin.write(SIZE.pack(len(request)) + request)
            process.stdin.flush()
        header = process.stdout.read(1 + SIZE.size)
        if len(header) == 1 + SIZE.size:
            (size,) = SIZE.unpack(header[1:])
            answer = process.stdout.read(size)
            if len(answer) == size:
                return header[:1], answer.decode("utf-8", "surrogatepass")
        ended = -process.wait()
        if ended == signal.SIGXCPU:
            raise EndlessTemplateError(f"it computes longer than {self._seconds} s")
        if ended in CRASHES:
            raise ChatTemplateError(f"it crashes ({signal.Signals(ended).name})")
        raise EngineError("the process that renders chat templates was ended; run the same command again to resume")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


RENDERER = Renderer()
