"""What `make gpu` runs, tried on a CPU; the GPU's own figures come from a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import DRY, GPU, SECONDS, steps
from bench.lib.profile import shares
from bench.lib.steps import FAILED, OK, SKIPPED, TIMED_OUT, Step, run_step

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")

# Two steps more, which go before the others: one that fails, and one that is not done in time.
SCRIPT = """
import sys
import bench.gpu
from bench.__main__ import bench as command
from bench.lib.steps import Step
planned = bench.gpu.steps
wrong = [Step("wrong", ("engines", "--rows", "many"), 60), Step("endless", ("select",), 0.5)]
bench.gpu.steps = lambda *arguments: [*wrong, *planned(*arguments)]
command(["gpu", "--dry", "--output", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A dry run with those two, without a model in the cache."""
    folder = tmp_path_factory.mktemp("gpu")
    environment = os.environ | {"SCORER_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    return done, json.loads((folder / "gpu.json").read_text())


def test_every_step_is_taken(dry: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    done, document = dry
    planned = [step.name for step in steps(DRY, "", Path(), vllm=True)]
    taken = document["steps"][2:]
    assert [step["name"] for step in taken] == planned
    for step in taken:
        if step["status"] == SKIPPED:
            assert step["why"] == "vLLM is not installed"
            continue
        assert (step["status"], step["exit_code"]) == (OK, 0), step
        assert ("result" in step) is (": vllm" not in step["name"]), "vLLM's command lines are checked, and not run"
    found = {step["name"]: step.get("result") for step in taken}
    assert found["kernels against float64"]["wrong"] == found["packed against reference"]["wrong"] == []
    assert len(found["kernels against float64"]["kernels"]) == 7
    assert found["scorer score"]["tokenizer"].startswith("bytes, by ")
    assert sum(found["scorer score"]["status"].values()) == 16
    assert "device_computes" not in found["scorer score"]  # there is no device
    assert document["machine"]["torch"]
    assert "scorer score: ok in " in done.stderr


def test_a_step_that_fails_or_hangs_is_reported(
    dry: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    done, document = dry
    wrong, endless = document["steps"][:2]
    assert (wrong["status"], wrong["exit_code"]) == (FAILED, 2)
    assert "'many' is not a valid integer" in wrong["stderr"]
    assert (endless["status"], endless["exit_code"]) == (TIMED_OUT, None)
    assert 0.5 <= endless["seconds"] < 10
    assert done.returncode == 1
    assert done.stderr.endswith("not done: wrong; endless\n")


def test_steps_that_cannot_run_say_why() -> None:
    without = [step for step in steps(GPU, "", Path(), vllm=False) if step.without]
    assert len(without) == 4
    for step in without:
        reported = run_step(step, start=pytest.fail, left=1)
        assert (reported["status"], reported["why"]) == (SKIPPED, "vLLM is not installed")
    late = run_step(Step("late", ("kernel",), 60), start=pytest.fail, left=0)
    assert (late["status"], late["why"]) == (SKIPPED, "no time is left")
    assert SECONDS == 8 * 60


def test_the_share_of_the_time_that_the_device_computes() -> None:
    kernels = {f"kernel {i}": 0.1 for i in range(12)} | {"head": 0.8}
    found = shares(kernels, 2.5)
    assert found["device_computes"] == pytest.approx(0.8)
    assert found["kernel_seconds"] == pytest.approx(2.0)
    assert len(found["costliest_kernels"]) == 10
    assert found["costliest_kernels"][0] == pytest.approx({"name": "head", "seconds": 0.8, "share_of_kernels": 0.4})
