"""Runs kernels_interpreted.py in its own process: Triton's interpreter is enabled when Triton is first imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1] / "lib" / "kernels_interpreted.py"


def test_interpreted_kernels() -> None:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "--color=no", str(TESTS)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parents[2] / "kernels")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
