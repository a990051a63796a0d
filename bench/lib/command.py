"""How a benchmark's command is written in its result."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path


def shown(arguments: Iterable[str]) -> str:
    """The command line, without local paths."""
    return shlex.join(["python", "-m", "bench", *(Path(word).name if "/" in word else word for word in arguments)])
