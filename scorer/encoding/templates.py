"""Chat templates, rendered in a process of their own, which the kernel holds to limits of time and memory."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from scorer.encoding.template_process import SIZE
from scorer.types import EngineError

SECONDS = 10  # of computing, for one rendering: a conversation of several MB takes a hundredth
PROCESS = Path(__file__).with_name("template_process.py")
GROUP, GROUP_BYTES = 256, 8 << 20  # renderings asked for at a time: a switch of processes takes as long as one
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)  # such as recursion outside of Python


class ChatTemplateError(ValueError):
    """A template gives no text for a conversation."""


class EndlessTemplateError(ChatTemplateError):
    """A template computes longer than it may."""


Request = tuple[str, Mapping[str, Any]]  # the source of a template, and variables: anything that can be pickled


class Renderer:
    """The process that renders, started when it is needed, and again after a template ended it."""

    def __init__(self, seconds: int = SECONDS):
        self._lock, self._seconds = Lock(), seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(
        self, requests: Sequence[Request], common: Mapping[str, Any] | None = None, *, patience: int = 1
    ) -> list[str | ChatTemplateError]:
        """The text of each template with its variables and those in `common`, or why it has none.

        Raises EndlessTemplateError where `patience` renderings have no end, EngineError where the process was killed.
        """
        answers: list[str | ChatTemplateError] = []
        shared = pickle.dumps(dict(common or {}))
        with self._lock:
            try:
                while len(answers) < len(requests):
                    answers += self._exchange(shared, requests[len(answers) : len(answers) + GROUP])
                    if isinstance(answers[-1], EndlessTemplateError):
                        patience -= 1
                        if not patience:
                            raise answers[-1]
            except BaseException:  # an answer that nobody has read would be taken for the next one
                self._stop()
                raise
        return answers

    def _exchange(self, shared: bytes, requests: Sequence[Request]) -> list[str | ChatTemplateError]:
        """The answers to the first of some requests, to one at least; nothing comes after an EndlessTemplateError."""
        group, count = bytearray(SIZE.pack(len(shared)) + shared), 0
        for source, variables in requests:
            try:
                request = pickle.dumps((source, dict(variables)))
            except Exception as error:  # noqa: BLE001 (what a record holds may be anything)
                if not count:
                    return [ChatTemplateError(f"{type(error).__name__}: {error}")]
                break
            group += SIZE.pack(len(request)) + request
            count += 1
            if len(group) > GROUP_BYTES:
                break
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it ended: see below
            process.stdin.write(SIZE.pack(len(group)))
            process.stdin.write(group)
            process.stdin.flush()
        answers: list[str | ChatTemplateError] = []
        while len(answers) < count:
            header = process.stdout.read(1 + SIZE.size)
            size = SIZE.unpack(header[1:])[0] if len(header) == 1 + SIZE.size else 0
            content = process.stdout.read(size)
            if len(header) < 1 + SIZE.size or len(content) < size:
                ended = process.wait()
                self._stop()
                return [self._fault(-ended)] if count == 1 else self._one_by_one(shared, requests[:count])
            text = content.decode()
            answers.append(text if header[:1] == b"1" else ChatTemplateError(text))
        return answers

    def _one_by_one(self, shared: bytes, requests: Sequence[Request]) -> list[str | ChatTemplateError]:
        """The answers up to the request that ended the process."""
        answers: list[str | ChatTemplateError] = []
        for request in requests:
            answers += self._exchange(shared, [request])
            if isinstance(answers[-1], EndlessTemplateError):
                break
        return answers

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():  # pipes that a fork shares are its parent's
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(PROCESS), str(self._seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C does not reach it: what it was at would look like a template's fault
            )
        return self._process

    def _fault(self, ended: int) -> ChatTemplateError:
        """What the template did to end the process by a signal. Raises EngineError where it was another's."""
        if ended == signal.SIGXCPU:
            return EndlessTemplateError(f"it computes longer than {self._seconds} s")
        if ended in CRASHES:
            return ChatTemplateError(f"it crashes ({signal.Signals(ended).name})")
        raise EngineError("the process that renders chat templates was ended; run the same command again to resume")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


RENDERER = Renderer()
