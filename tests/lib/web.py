"""A server that answers with any bytes, at any speed."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from threading import Event, Lock, Thread

Sent = bytes | Iterator[bytes]


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A whole HTTP response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def drip(body: bytes, first: bytes = b"") -> Iterator[bytes]:
    """A byte now and then, for ever."""
    yield first
    while True:
        time.sleep(0.05)
        yield body


def silent() -> Iterator[bytes]:
    time.sleep(5)
    yield b""


class WebServer:
    """A server on a real socket. `answer` gives the bytes, or pieces of them, that it sends for the body of a POST.

    page: for a GET. requests: the POSTs so far. headers: those of the last request, as they came.
    """

    def __init__(self, answer: Callable[[bytes], Sent], page: Sent = b""):
        self.answer, self.page = answer, page
        self.requests = 0
        self.headers: dict[bytes, bytes] = {}
        self.closed, self.lock = Event(), Lock()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.closed.is_set():
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            first, headers = stream.readline(), dict[bytes, bytes]()
            while (line := stream.readline().strip()) != b"":
                name, _, value = line.partition(b": ")
                headers[name] = value
            self.headers, answer = headers, self.page
            if first.startswith(b"POST"):
                with self.lock:
                    self.requests += 1
                answer = self.answer(stream.read(int(headers[b"Content-Length"])))
            try:
                for piece in [answer] if isinstance(answer, bytes) else answer:
                    connection.sendall(piece)
            except OSError:
                pass  # the client has gone

    def close(self) -> None:
        self.closed.set()
        self.socket.close()
