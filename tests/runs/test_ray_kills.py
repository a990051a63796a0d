"""Two nodes on one machine, each a real raylet with its own workers: whoever is killed, the table is the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
from polars.testing import assert_frame_equal
from ray._private import ray_constants
from ray.cluster_utils import Cluster as Nodes

from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from scorer.runs.shard_file import read_info
from tests.lib.command import Commands, alpaca, shards, wait
from tests.lib.nodes import all_workers, end, raylet, started, workers

pytestmark = pytest.mark.slow
Tiny = Callable[[str], ModelFiles]

ROWS, SHARD_ROWS = 900, 10  # so large that a worker always has shards in hand that it has not written
HOLD = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=1)
class Other: pass
others = [Other.remote() for _ in range(2)]
ray.get([other.__ray_ready__.remote() for other in others])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head of one CPU, where drivers connect."""
    with started(num_cpus=1) as cluster:
        yield cluster


@pytest.fixture
def second(nodes: Nodes) -> Iterator[Any]:
    """Another node of one CPU."""
    yield nodes.add_node(num_cpus=1)
    for node in list(nodes.worker_nodes):
        nodes.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "data.json").write_text(json.dumps(alpaca(ROWS, words=10)))
    return folder


@pytest.fixture(scope="module")
def command(tiny: Tiny) -> list[object]:
    model = tiny("gpt2").path
    return ["score", "data.json", "--model", model, "--device", "cpu", "--dtype", "float32", "--shard-rows", SHARD_ROWS]


@pytest.fixture(scope="module")
def expected(command: list[object], place: Path) -> pl.DataFrame:
    Commands(place)(*command, "-o", "local").done()
    return Run(place / "local").scores()


def kill_worker(nodes: Nodes) -> bool:
    """Whether one was there to be killed."""
    try:
        all_workers(nodes)[0].kill()
    except (IndexError, psutil.NoSuchProcess):
        return False
    return True


def kill_node(node: Any) -> None:
    """With all that runs there, as where its power fails."""
    parent = psutil.Process(raylet(node))
    for process in (parent, *parent.children(recursive=True)):
        process.kill()


def more(run: Path) -> Callable[[], bool]:
    """Whether the run has more shards than now."""
    before = shards(run)
    return lambda: shards(run) > before


def stop_in_the_middle(node: Any, run: Path) -> None:
    """Stop the worker of a node after it has written a shard, with others in hand."""

    def writer() -> psutil.Process | None:
        written = {int(read_info(shard).by.rpartition("process ")[2]) for shard in Run(run).shards()}
        return next((worker for worker in workers(raylet(node)) if worker.pid in written), None)

    wait(writer).suspend()


def same(run: Path, expected: pl.DataFrame) -> None:
    assert_frame_equal(Run(run).scores(), expected, rel_tol=1e-5, abs_tol=0.0)


def test_workers_nodes_and_drivers_die(
    nodes: Nodes, second: Any, command: list[object], place: Path, expected: pl.DataFrame
) -> None:
    """One run of three commands.

    The first loses a worker, and is killed itself; the second is interrupted; the third loses a node for good.
    """
    run, commands = place / "deaths", Commands(place)
    whole = (*command, "-o", "deaths", "--ray", nodes.address, "--workers")
    running = commands.start(*whole, 2)
    wait(more(run))
    wait(lambda: kill_worker(nodes))
    wait(more(run))
    assert running.kill().code == -signal.SIGKILL
    wait(lambda: not all_workers(nodes))  # the cluster is others' too

    written = more(run)
    running = commands.start(*whole, 1)
    wait(written)
    assert running.kill(signal.SIGINT).code == 130
    wait(lambda: not all_workers(nodes))

    running = commands.start(*whole, 2)
    stop_in_the_middle(second, run)
    kill_node(second)  # the other worker goes on
    assert shards(run) < ROWS / SHARD_ROWS
    said = end(running)
    assert "resuming after" in said
    assert "workers died; going on with" in said
    same(run, expected)
    by = Run(run).manifest.shards_by
    assert sum(by.values()) == ROWS / SHARD_ROWS
    assert len(by) >= 2
    assert max(by.values()) < ROWS / SHARD_ROWS
    wait(lambda: not all_workers(nodes))


def test_what_others_hold_is_waited_for_and_said(nodes: Nodes, second: Any, command: list[object], place: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, nodes.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    few = (*command, "--limit", 30, "-o", "waits", "--ray", "auto", "--workers", 2)
    running = Commands(place).start(*few, RAY_ADDRESS=nodes.address)
    said = "others hold a part of it now, and workers wait for that: 0 GPUs and 0 CPUs are free"
    wait(lambda: said in running.stem.with_suffix(".err").read_text())
    time.sleep(3)
    assert running.process.exitcode is None
    assert not shards(place / "waits")
    other.communicate()
    end(running)
    assert shards(place / "waits") == 3


def test_a_node_with_another_version_is_named(nodes: Nodes, command: list[object], place: Path) -> None:
    """A real directory of another release's metadata, before all others on that node's path."""
    folder = place / "site" / "ifd_scorer-9.9.9.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: ifd-scorer\nVersion: 9.9.9\n")
    other = nodes.add_node(num_cpus=2, env_vars={"PYTHONPATH": str(folder.parent)})
    try:
        big = ("--ray", nodes.address, "--cpus-per-worker", 1.5)  # which only the new node has
        err = end(Commands(place).start(*command, "--limit", 9, "-o", "version", *big), code=2).splitlines()[-1]
    finally:
        nodes.remove_node(other, allow_graceful=False)
    assert f"ifd-scorer 9.9.9, not {version('ifd-scorer')}" in err
    assert ", process " in err
    assert not shards(place / "version")


def test_a_cluster_of_another_ray_is_refused(nodes: Nodes, command: list[object], place: Path) -> None:
    """The cluster keeps its versions where every driver reads them."""
    store, key = nodes.head_node.get_gcs_client(), b"CLUSTER_METADATA"
    kept = store.internal_kv_get(key, ray_constants.KV_NAMESPACE_CLUSTER)
    try:
        changed = json.dumps(json.loads(kept) | {"ray_version": "1.2.3"}).encode()
        store.internal_kv_put(key, changed, True, ray_constants.KV_NAMESPACE_CLUSTER)
        err = end(Commands(place).start(*command, "-o", "ray", "--ray", nodes.address), code=2).splitlines()[-1]
    finally:
        store.internal_kv_put(key, kept, True, ray_constants.KV_NAMESPACE_CLUSTER)
    assert nodes.address in err
    assert "Version mismatch" in err
    assert "1.2.3" in err
