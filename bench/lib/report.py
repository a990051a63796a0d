"""Prints and saves a benchmark's result, with the machine, the versions and the command."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.lib.command import shown
from scorer.engines.choose import engine_versions

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "transformers", "triton")


def machine() -> dict[str, Any]:
    """The names of the CPU and GPU, and the versions of Python and of the packages that compute."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    return (
        {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
        }
        | {name: version(name) for name in PACKAGES if find_spec(name)}
        | engine_versions("vllm")
    )


def result_path(*names: str) -> Path:
    """The file in bench/results whose name is made of these."""
    return RESULTS / f"{re.sub('[^a-z0-9.]+', '-', '-'.join(names).lower())}.json"


def finish(name: str, result: dict[str, Any], save: bool, *labels: str) -> None:
    """Print the result as one line of JSON; with `save`, also write bench/results/NAME-LABELS-DEVICE.json."""
    command = shown(sys.argv[1:])
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    document = {"benchmark": name, "command": command, "date": date, "machine": machine(), **result}
    if save:
        path = result_path(name, *labels, document["machine"]["gpu"] or document["machine"]["cpu"])
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))
