"""Prints and saves a benchmark's result, with the machine, the versions and the command."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def machine() -> dict[str, Any]:
    """The names of the CPU and GPU, and the versions of Python, torch and transformers."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    } | {name: version(name) for name in ("torch", "transformers")}


def finish(name: str, result: dict[str, Any], save: bool, *labels: str) -> None:
    """Print the result as one line of JSON; with `save`, also write bench/results/NAME-LABELS-DEVICE.json."""
    arguments = (Path(word).name if "/" in word else word for word in sys.argv[1:])  # no local paths in results
    command = shlex.join(["python", "-m", "bench", *arguments])
    document = {"benchmark": name, "command": command, "machine": machine(), **result}
    if save:
        device = document["machine"]["gpu"] or document["machine"]["cpu"]
        stem = re.sub("[^a-z0-9.]+", "-", "-".join((name, *labels, device)).lower())
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{stem}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))
