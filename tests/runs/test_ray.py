"""A run on Ray is a run: the same table, whatever the number of workers, and whoever dies."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster as Nodes

from scorer.config import Cluster, ScoreConfig
from scorer.data.dataset import inspect_input
from scorer.models.find import ModelFiles
from scorer.runs.ray_driver import WorkerPlan, plan_workers
from scorer.runs.ray_worker import Reader
from scorer.types import ScorerError
from tests.lib.command import Commands, alpaca, assert_gone, shards, wait
from tests.lib.nodes import all_workers, end, started, workers

Tiny = Callable[[str], ModelFiles]


ONE, TWO = {"CPU": 1.0}, {"CPU": 2.0}


@pytest.mark.parametrize(
    ("cluster", "nodes", "expected"),
    [
        (Cluster(), [TWO], WorkerPlan(1, 0.0, 2.0)),
        (Cluster(workers=2), [TWO], WorkerPlan(2, 0.0, 1.0)),
        (Cluster(gpus_per_worker=1), [{"CPU": 32.0, "GPU": 8.0}], WorkerPlan(8, 1.0, 1.0)),
        (Cluster(gpus_per_worker=0.5), [{"CPU": 32.0, "GPU": 2.0}], WorkerPlan(4, 0.5, 1.0)),
        (Cluster(workers=3, gpus_per_worker=1), [{"CPU": 2.0, "GPU": 4.0}], WorkerPlan(3, 1.0, 0.66)),
        (Cluster(workers=2, cpus_per_worker=4), [{"CPU": 16.0}], WorkerPlan(2, 0.0, 4.0)),
        (Cluster(), [ONE, ONE], WorkerPlan(1, 0.0, 1.0)),
        (Cluster(workers=2), [ONE, ONE], WorkerPlan(2, 0.0, 1.0)),
        (Cluster(workers=3), [ONE, TWO], WorkerPlan(3, 0.0, 1.0)),  # one of them, and two of the other
        (Cluster(gpus_per_worker=0.6), [{"CPU": 4.0, "GPU": 1.0}] * 3, WorkerPlan(3, 0.6, 1.0)),  # and not 3 / 0.6
        (Cluster(gpus_per_worker=1), [ONE, {"CPU": 8.0, "GPU": 2.0}], WorkerPlan(2, 1.0, 1.0)),  # a head without a GPU
    ],
)
def test_workers_share_what_there_is(cluster: Cluster, nodes: list[dict[str, float]], expected: WorkerPlan) -> None:
    assert plan_workers(cluster, nodes) == expected


@pytest.mark.parametrize(
    ("cluster", "nodes", "words"),
    [
        (Cluster(workers=3, cpus_per_worker=1), [TWO], "3 workers of 0 GPUs and 1 CPUs each do not fit"),
        (
            Cluster(workers=4, gpus_per_worker=1),
            [{"CPU": 32.0, "GPU": 2.0}],
            "the cluster has 2 GPUs and 32 CPUs",
        ),
        (Cluster(gpus_per_worker=1), [{"CPU": 32.0}], "has 0 GPUs"),
        (Cluster(cpus_per_worker=2), [ONE, ONE], r"has 0 GPUs and 2 CPUs \(nodes: 2 of 0 and 1\)"),
        (Cluster(workers=4, cpus_per_worker=0.6), [ONE] * 3, "3 of 0 and 1"),  # 3 CPUs, and 2.4 asked
        (Cluster(gpus_per_worker=2), [{"CPU": 4.0, "GPU": 1.0}] * 2, "2 of 1 and 4"),
        (Cluster(), [], "has 0 GPUs and 0 CPUs"),
    ],
)
def test_more_than_the_cluster_has_is_refused(cluster: Cluster, nodes: list[dict[str, float]], words: str) -> None:
    with pytest.raises(ScorerError, match=words):
        plan_workers(cluster, nodes)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A cluster of two CPUs, for the tests that need no Ray of their own."""
    with started(num_cpus=2) as cluster:
        yield cluster


@pytest.fixture
def arguments(tiny: Tiny, tmp_path: Path) -> list[object]:
    rows = alpaca(901, words=10)
    rows[3]["output"], rows[7]["output"], rows[31]["output"] = " ", "y", 7
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return ["data.json", "--model", tiny("gpt2").path, "--device", "cpu", "--dtype", "float32", "--shard-rows", 3]


@pytest.fixture
def command(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


@pytest.mark.slow
def test_bad_clusters_are_one_line(nodes: Nodes, command: Commands, arguments: list[object]) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:  # it listens, and never answers
        port = silent.getsockname()[1]
        cases = {
            ("--ray", "127.0.0.1:1"): "--ray 127.0.0.1:1: no Ray there",
            ("--ray", f"127.0.0.1:{port}"): f"--ray 127.0.0.1:{port}: ",
            ("--ray", "a..b:6379"): "--ray a..b:6379: no Ray there",
            ("--ray", "ray://127.0.0.1:10001"): "--ray ray://127.0.0.1:10001: Ray Data does not run through",
            ("--ray", "auto"): "--ray auto (RAY_ADDRESS is 127.0.0.1:1): no Ray there",
            ("--ray", nodes.address, "--gpus-per-worker", 64): "the cluster has 0 GPUs",
            ("--ray", "local", "--gpus-per-worker", 1.5): "neither a share of one GPU nor whole GPUs",
            ("--workers", 2): "without --ray",
            ("--ray", "local", "--workers", 0): "neither auto nor a whole number",
        }
        began = {
            words: command.start("score", *arguments, "-o", f"bad-{i}", *options, RAY_ADDRESS="127.0.0.1:1")
            for i, (options, words) in enumerate(cases.items())
        }
        for words, process in began.items():
            assert words in end(process, code=2).splitlines()[-1]


@pytest.mark.slow
def test_an_engine_that_cannot_be_opened_ends_the_run_as_it_does_locally(
    nodes: Nodes, command: Commands, tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(tiny("gpt2").path, tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(alpaca(20)))
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    whole = ("score", "data.json", "--model", "model", "--device", "cpu", "--shard-rows", 5)
    both = [command.start(*whole, "-o", "local"), command.start(*whole, "-o", "run", "--ray", nodes.address)]
    local, spread = (end(process, code=2).splitlines()[-1] for process in both)
    assert "the weights are truncated" in local
    assert spread == local


@pytest.mark.slow
def test_an_input_that_goes_away_is_named(
    nodes: Nodes, command: Commands, arguments: list[object], tmp_path: Path
) -> None:
    running = command.start("score", *arguments, "-o", "run", "--ray", nodes.address)
    wait(lambda: (tmp_path / "run" / "manifest.json").exists())
    (tmp_path / "data.json").unlink()  # counted, and not yet read: Ray starts for seconds
    assert "data.json" in end(running, code=2).splitlines()[-1]


def test_another_copy_on_a_node_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(alpaca(3)))
    here = inspect_input(data)
    for entry, words in ((here, None), (replace(here, size=here.size + 1), "bytes, and")):
        (row,) = Reader(ScoreConfig(), [entry], [3])({"shards": [[0]]})
        found = pickle.loads(row["records"][0])
        assert (row["index"] == [0] and len(found) == 3) if words is None else words in str(found)


@pytest.mark.slow
def test_a_worker_that_always_dies_ends_the_run(
    nodes: Nodes, command: Commands, arguments: list[object], tmp_path: Path
) -> None:
    """The kernel's OOM killer may end a worker each time that it has loaded the model."""
    running = command.start("score", *arguments, "-o", "run", "--ray", nodes.address, "--workers", 1)
    killed = 0
    while running.process.exitcode is None:
        for process in all_workers(nodes):
            process.kill()
            killed += 1
        time.sleep(0.05)
    err = end(running, code=1)
    assert "no worker lived to score shard 0 or a later one" in err.splitlines()[-1]
    assert 3 <= killed < 20
    assert shards(tmp_path / "run") == 0


def _more_than(run: Path, count: int) -> bool:
    return shards(run) > count


@pytest.mark.slow
def test_a_pass_that_breaks_off_leaves_its_workers_room_to_the_next(
    nodes: Nodes, command: Commands, arguments: list[object], tmp_path: Path
) -> None:
    limit = ("--workers", 1, "--limit", 301)
    running = command.start("score", *arguments, "-o", "run", "--ray", nodes.address, *limit)
    for _ in range(3):  # more shards die with them than one pass bears
        more = shards(tmp_path / "run") + 5
        wait(partial(_more_than, tmp_path / "run", more))
        (worker,) = all_workers(nodes)
        worker.kill()
    err = end(running)
    assert "workers died; going on with" in err
    assert "no shard for" not in err


@pytest.mark.slow
def test_control_c_is_heard_where_no_shard_comes(command: Commands, arguments: list[object]) -> None:
    running = command.start("score", *arguments, "-o", "run", "--ray", "local", "--workers", 1)
    wait(lambda: workers(running.pid))
    (worker,) = workers(running.pid)
    worker.suspend()  # as long as a large model takes to load
    time.sleep(2)
    ended = running.kill(signal.SIGINT)
    assert ended.code == 130, ended
    assert "interrupted; the same command goes on" in ended.err.splitlines()[-1]
    assert_gone([worker])
