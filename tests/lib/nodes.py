"""A Ray cluster whose nodes are real raylets of this machine, and the workers of `scorer` that run below them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
from ray._private import ray_constants
from ray.cluster_utils import Cluster as Nodes

from tests.lib.command import Running

# A node that is killed is missed after three seconds. Workers are as nice as those of `--ray local`.
QUICK = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
    "worker_niceness": 0,
    "prestart_worker_first_driver": False,  # a process for each CPU, which few tests use
}


@contextlib.contextmanager
def started(num_cpus: int) -> Iterator[Nodes]:
    """A cluster of one node, its head, where drivers connect."""
    head = {"num_cpus": num_cpus, "include_dashboard": False, "_system_config": QUICK}
    cluster = Nodes(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def raylet(node: Any) -> int:
    return int(node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid)


def workers(pid: int) -> list[psutil.Process]:
    """The workers that run below the process `pid`: of a driver that has started Ray itself, or of a node."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            name = " ".join(process.cmdline())
            if "MapWorker(MapBatches(Worker))" in name and "__init__" not in name:
                found.append(process)
    return found


def all_workers(nodes: Nodes) -> list[psutil.Process]:
    return [p for node in nodes.list_all_nodes() if psutil.pid_exists(raylet(node)) for p in workers(raylet(node))]


def end(process: Running, code: int = 0) -> str:
    """Standard error of a process that ended with `code`; Ray may have said something before our line."""
    ended = process.end()
    assert ended.code == code, f"{ended.code}: {ended.err[-1500:]}"
    assert "Traceback" not in ended.err
    return ended.err
