"""A run on Ray is a run: the same table, whatever the number of workers, and whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import psutil
import pytest
from polars.testing import assert_frame_equal

from scorer.distributed import Cluster, Plan, plan
from scorer.models import ModelFiles
from scorer.rundir import Run
from scorer.types import ScorerError
from tests.command import CONSOLE_SCRIPT, alpaca, shards, wait

Tiny = Callable[[str], ModelFiles]


@pytest.mark.parametrize(
    ("cluster", "device", "has", "expected"),
    [
        (Cluster(), "cpu", {"CPU": 2.0}, Plan(1, 0.0, 1.5)),
        (Cluster(workers=2), "cpu", {"CPU": 2.0}, Plan(2, 0.0, 0.75)),
        (Cluster(), "cuda", {"CPU": 32.0, "GPU": 8.0}, Plan(8, 1.0, 1.0)),
        (Cluster(gpus_per_worker=0.5), "cuda", {"CPU": 32.0, "GPU": 2.0}, Plan(4, 0.5, 1.0)),
        (Cluster(workers=3), "cuda", {"CPU": 2.0, "GPU": 4.0}, Plan(3, 1.0, 0.5)),
        (Cluster(workers=2, cpus_per_worker=4), "cpu", {"CPU": 16.0}, Plan(2, 0.0, 4.0)),
    ],
)
def test_workers_leave_room_for_what_feeds_them(
    cluster: Cluster, device: str, has: dict[str, float], expected: Plan
) -> None:
    assert plan(cluster, device, has) == expected


@pytest.mark.parametrize(
    ("cluster", "device", "has", "words"),
    [
        (Cluster(workers=2, cpus_per_worker=1), "cpu", {"CPU": 2.0}, "2 workers of 1 CPUs"),
        (Cluster(workers=4), "cuda", {"CPU": 32.0, "GPU": 2.0}, "need 4, and the cluster has 2 GPUs and 32 CPUs"),
        (Cluster(), "cuda", {"CPU": 32.0}, "has 0 GPUs"),
    ],
)
def test_more_than_the_cluster_has_is_refused(cluster: Cluster, device: str, has: dict[str, float], words: str) -> None:
    with pytest.raises(ScorerError, match=words):
        plan(cluster, device, has)


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [CONSOLE_SCRIPT, *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out, err)
    assert "Traceback" not in err
    return err


def same(run: Path, expected: pl.DataFrame) -> None:
    assert_frame_equal(Run(run).scores(), expected, rel_tol=1e-5, abs_tol=0.0)


@pytest.fixture
def arguments(tiny: Tiny, tmp_path: Path) -> list[object]:
    rows = alpaca(301)
    rows[3]["output"], rows[7]["output"], rows[31]["output"] = " ", "y", 7
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return ["data.json", "--model", tiny("gpt2").path, "--device", "cpu", "--dtype", "float32", "--shard-rows", 10]


def test_two_workers_give_the_local_table_and_survive_a_death(arguments: list[object], tmp_path: Path) -> None:
    end(start(tmp_path, "score", *arguments, "-o", "local"))
    expected = Run(tmp_path / "local").scores()
    assert Run(tmp_path / "local").manifest["shards_by"] == {"this process": 31}

    running = start(tmp_path, "score", *arguments, "-o", "spread", "--ray", "local", "--workers", 2)
    wait(lambda: shards(tmp_path / "spread") > 1 and len(Run(tmp_path / "spread").manifest["shards_by"]) == 2)
    workers = [p for p in psutil.Process(running.pid).children(recursive=True) if "_Worker" in " ".join(p.cmdline())]
    assert len(workers) == 2, [p.cmdline() for p in psutil.Process(running.pid).children(recursive=True)]
    workers[0].send_signal(signal.SIGKILL)
    end(running)
    same(tmp_path / "spread", expected)
    manifest = Run(tmp_path / "spread").manifest
    assert sum(manifest["shards_by"].values()) == 31
    assert len(manifest["shards_by"]) >= 2
    assert max(manifest["shards_by"].values()) < 31


def test_the_driver_dies_and_the_same_command_finishes(arguments: list[object], tmp_path: Path) -> None:
    end(start(tmp_path, "score", *arguments, "-o", "local"))
    command = ("score", *arguments, "-o", "run", "--ray", "local", "--workers", 2)
    running = start(tmp_path, *command)
    wait(lambda: shards(tmp_path / "run") > 1)
    family = psutil.Process(running.pid).children(recursive=True)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    psutil.wait_procs(family, timeout=60)
    left = shards(tmp_path / "run")
    assert left < 31
    (tmp_path / "run" / "scores" / "part-00000.parquet").unlink()  # a hole, as one worker of several leaves
    end(start(tmp_path, *command))
    same(tmp_path / "run", Run(tmp_path / "local").scores())


def test_bad_clusters_are_one_line(arguments: list[object], tmp_path: Path) -> None:
    for options, words in (
        (("--ray", "127.0.0.1:1"), "--ray 127.0.0.1:1"),
        (("--ray", "local", "--gpus-per-worker", 64), "the cluster has"),
        (("--workers", 2), "for --ray"),
        (("--ray", "local", "--workers", 0), "neither auto nor a whole number"),
    ):
        began = time.monotonic()
        err = end(start(tmp_path, "score", *arguments, "-o", "bad", *options), code=2)
        assert words in err.splitlines()[-1], err
        assert time.monotonic() - began < 60
