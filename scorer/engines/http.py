"""One HTTP request to a server that is not trusted: bounded in time and in bytes, never redirected or decompressed.

Knows HTTP and JSON; neither the routes of a server nor what it answers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

import orjson

from scorer.files.json_texts import too_deep
from scorer.printing import printable
from scorer.types import ScorerError

CONNECT_SECONDS = 5.0
SHOWN_CHARACTERS = 300


class UnreachableError(Exception):
    """The server can't be reached, or broke off before its answer ended: it may be restarting."""


class TooLateError(Exception):
    """The answer did not end in time."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: `body` is JSON. The answer has at most `most_bytes` and ends within `seconds`."""

    method: str
    path: str
    body: bytes | None
    seconds: float
    most_bytes: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The status, two headers ("" where there is none), and the body: cut after one byte too many."""

    status: int
    location: str
    retry_after: str
    body: bytes


class Address:
    """The address of a server, http://HOST:PORT or https://HOST:PORT, and a path before that of each request.

    Raises ScorerError for any other URL. Its text is not shown then: it may hold a password.
    """

    def __init__(self, url: str):
        try:
            parts = urlsplit(url)
            self.port = parts.port
        except ValueError:
            parts, self.port = urlsplit(""), None
        plain = url.isascii() and url.isprintable() and " " not in url
        if not parts.hostname or not plain or any((parts.username, parts.password, parts.query, parts.fragment)):
            raise ScorerError("the server's URL is not http://HOST:PORT, without a user, a password or a query")
        self.host, self.prefix = parts.hostname, parts.path.rstrip("/")
        self.connection = HTTPSConnection if parts.scheme == "https" else HTTPConnection

    def ask(self, request: Request, headers: Mapping[str, str], waiting: tuple[float, Callable[[], None]]) -> Answer:
        """The answer to one request. `waiting`: after so many seconds without one, call this, in another thread.

        Raises UnreachableError and TooLateError.
        """
        connection = self.connection(self.host, self.port, timeout=CONNECT_SECONDS)
        done, late = Event(), Event()
        stream: socket.socket | None = None  # `connection` forgets it where the answer ends with the connection

        def cancel() -> None:
            late.set()
            with suppress(OSError, AttributeError):  # not connected, or just closed
                (stream or connection.sock).shutdown(socket.SHUT_RDWR)

        def watch() -> None:
            quiet, note = waiting
            for seconds, act in ((quiet, note), (request.seconds - quiet, cancel)):
                if done.wait(max(seconds, 0)):
                    return
                act()

        # A socket's own timeout is for one byte; a server could send one at a time for ever.
        Thread(target=watch, daemon=True, name="scorer-http-watch").start()
        try:
            connection.connect()
            stream = connection.sock
            stream.settimeout(request.seconds)
            if late.is_set():  # while there was nothing to shut down
                raise TimeoutError
            connection.request(request.method, self.prefix + request.path, request.body, dict(headers))
            response = connection.getresponse()
            body = response.read(request.most_bytes + 1)
            if late.is_set():
                raise TimeoutError
            if response.length and len(body) <= request.most_bytes:
                raise IncompleteRead(body, response.length)
            location, retry_after = (response.getheader(name, "") for name in ("Location", "Retry-After"))
            return Answer(response.status, location, retry_after, body)
        except Exception as error:  # whatever a parser of untrusted bytes, or a socket closed under it, may raise
            if late.is_set() or (isinstance(error, TimeoutError) and stream is not None):
                raise TooLateError from error
            raise UnreachableError(_reason(error)) from error
        finally:
            done.set()
            connection.close()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, IncompleteRead):
        return "the connection ended before the answer did"
    return f"not HTTP: {type(error).__name__}" if isinstance(error, HTTPException) else type(error).__name__


def api_key(*variables: str) -> str:
    """The API key of the first of some environment variables that is set, or "". Raises ScorerError for a wrong one."""
    name = next(filter(os.environ.get, variables), variables[0])
    key = os.environ.get(name, "")
    if not (key.isascii() and key.isprintable()):
        raise ScorerError(f"{name}: an HTTP header can't hold its characters")
    return key


def json_headers(key: str) -> dict[str, str]:
    """The headers of a request with a JSON body, and with an API key unless that is ""."""
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def json_object(body: bytes, most_bytes: int) -> dict[str, Any]:
    """The JSON object that the body of an Answer is. Raises ValueError, with the reason, for any other body."""
    if len(body) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    if too_deep(body):
        raise ValueError("its JSON is nested too deep")
    try:
        parsed = orjson.loads(body)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({shown(body[:40])})") from error
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    return parsed


def shown(text: str | bytes) -> str:
    """Text of a server for a message: on one line, and cut."""
    if isinstance(text, bytes):
        text = text[: 4 * SHOWN_CHARACTERS].decode(errors="replace")
    line = printable(" ".join(text[: 4 * SHOWN_CHARACTERS].split()))
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}..."
