"""Pages in a real, headless Chromium: what is on them, what they say to the console, and whom they call."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-features=NetworkTimeServiceQuerying",
    "--disable-sync",
    "--no-first-run",
    "--no-pings",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
    "--window-size=1300,4000",
    # What the browser asks for of its own accord goes to a closed port, past the proxy.
    "--component-updater=url-source=http://127.0.0.1:9,disable-background-downloads",
    "--gaia-url=http://127.0.0.1:9",
)
SECONDS = 300  # it takes a few, on a quiet machine


@dataclass(frozen=True)
class Opened:
    """A page after it was opened: its document as it then is, its console's lines, and the requests that left it.

    A request is its first line, "" where a connection was opened and nothing asked for.
    """

    document: str
    console: list[str]
    requests: list[str]
    screenshot: Path


def open_page(page: Path, folder: Path) -> Opened:
    """Open a page, with a proxy for all requests that notes them and answers none."""
    found = [path for name in NAMES if (path := shutil.which(name))]
    if not found:
        pytest.fail(f"this test opens a page in Chromium: install it, so that there is {' or '.join(NAMES)}")
    requests: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_note, args=(server, requests), daemon=True).start()
        proxy = f"--proxy-server=http://127.0.0.1:{server.getsockname()[1]}"
        outputs = []
        for number, what in enumerate(("--dump-dom", f"--screenshot={folder / 'screenshot.png'}")):
            profile = folder / f"profile-{number}"
            profile.mkdir()
            arguments = [found[0], *FLAGS, proxy, f"--user-data-dir={profile}", what, page.as_uri()]
            outputs.append(subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=SECONDS))
            shutil.rmtree(profile, ignore_errors=True)
    console = [line for output in outputs for line in re.findall(r".*:CONSOLE.*", output.stderr)]
    return Opened(outputs[0].stdout, console, requests, folder / "screenshot.png")


def _note(server: socket.socket, requests: list[str]) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # closed: the page was seen
            return
        with connection:
            connection.settimeout(SECONDS)
            try:
                line = connection.recv(4096).decode("latin-1").partition("\r\n")[0]
            except OSError:  # the browser hung up
                line = ""
            requests.append(line)
