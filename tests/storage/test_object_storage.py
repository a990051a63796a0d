"""Object storage works like a disk: against a real S3 server on loopback, which refuses, dies and comes back."""

from __future__ import annotations

import gzip
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import s3fs
from botocore.exceptions import BotoCoreError
from polars.testing import assert_frame_equal

from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from scorer.storage.lock import LEASE_SECONDS
from tests.lib.command import Commands, Running, alpaca, wait
from tests.lib.environments import build_wheel, make_environment

pytestmark = pytest.mark.slow
KEY, SECRET = "AKIDTHATISTOLDTONOBODY", "a-secret-that-is-told-to-nobody"
IDENTITIES = {
    "identities": [
        {"name": "admin", "credentials": [{"accessKey": "admin", "secretKey": "admin"}], "actions": ["Admin"]},
        {
            "name": "user",  # who may not create buckets
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Read:bucket", "List:bucket", "Write:bucket", "Tagging:bucket"],
        },
    ]
}
PORTS = ("s3.port", "master.port", "volume.port", "filer.port")


class Server:
    """SeaweedFS with one bucket; `environment` is that of a user of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "data").mkdir()
        (folder / "identities.json").write_text(json.dumps(IDENTITIES))
        self.ports = _free_ports(len(PORTS))
        self.endpoint = f"http://127.0.0.1:{self.ports[0]}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.start()
        admin = s3fs.S3FileSystem(key="admin", secret="admin", endpoint_url=self.endpoint)
        wait(lambda: _made(admin, "bucket"))

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                Path(sys.executable).with_name("weed"),
                f"-logdir={self.folder}",
                "server",
                "-s3",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                f"-dir={self.folder / 'data'}",
                "-volume.max=50",
                f"-s3.config={self.folder / 'identities.json'}",
                *(f"-{name}={port}" for name, port in zip(PORTS, self.ports, strict=True)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "log").open("a"),
            stderr=subprocess.STDOUT,
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def files(self) -> Any:
        """The store as a file system, for the test's own eyes."""
        return s3fs.S3FileSystem(
            key=KEY, secret=SECRET, endpoint_url=self.endpoint, use_listings_cache=False, skip_instance_cache=True
        )


def _free_ports(count: int) -> list[int]:
    """Ports that are free, as are those 10,000 above: the server takes them for gRPC."""
    with ExitStack() as held:
        found: list[int] = []
        for port in range(20_000 + os.getpid() % 20_000, 45_000):
            with suppress(OSError):
                for number in (port, port + 10_000):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError("no free ports")


def _made(store: Any, bucket: str) -> bool:
    """The bucket, once the server answers."""
    try:
        store.mkdir(bucket)
    except (OSError, BotoCoreError):
        return bool(store.exists(bucket))
    return True


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("store"))
    yield server
    server.stop()


class Shell(Commands):
    """The command `scorer` of a user of the store."""

    def __init__(self, folder: Path, server: Server):
        super().__init__(folder)
        self.server = server

    def start(self, *arguments: object, stdin: str = "", **env: str) -> Running:
        return super().start(*arguments, stdin=stdin, **self.server.environment | env)


@pytest.fixture
def shell(server: Server, tmp_path: Path) -> Shell:
    return Shell(tmp_path, server)


@pytest.fixture
def options(tiny: Callable[[str], ModelFiles]) -> list[object]:
    return ["--model", tiny("gpt2").path, "--device", "cpu", "--dtype", "float32", "--shard-rows", 20]


def table(server: Server, run: str) -> pl.DataFrame:
    """The score table of a run in the store, read by other means than scorer's."""
    files = server.files()
    return pl.concat([pl.read_parquet(files.cat(name)) for name in sorted(files.ls(f"{run}/scores"))])


def held(server: Server, run: str) -> int:
    """How many shards a run in the store has."""
    files = server.files()
    return len(files.ls(f"{run}/scores")) if files.exists(f"{run}/scores") else 0


def everything(server: Server, folder: str) -> bytes:
    files = server.files()
    return b"".join(files.cat(name) for name in files.find(folder))


def test_a_run_in_a_store_is_a_run(shell: Shell, server: Server, options: list[object], tmp_path: Path) -> None:
    rows = alpaca(100)
    rows[3]["output"], rows[30]["output"] = " ", 7
    lines = "".join(json.dumps(row) + "\n" for row in rows[:50]).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    pl.DataFrame([row | {"output": str(row["output"])} for row in rows[50:]]).write_parquet(tmp_path / "b.parquet")
    for name in ("a.jsonl.gz", "b.parquet"):
        server.files().put_file(str(tmp_path / name), f"bucket/in/{name}")
    shell("score", "a.jsonl.gz", "b.parquet", "-o", "local", *options).done()
    expected = Run(tmp_path / "local").scores()

    told = shell("score", "s3://bucket/in/*", "-o", "s3://bucket/run", *options)
    told.done()
    assert_frame_equal(table(server, "bucket/run"), expected, check_exact=True)
    again = shell("score", "s3://bucket/in/*", "-o", "s3://bucket/run", *options)
    assert "complete already" in again.done()
    manifest = json.loads(server.files().cat("bucket/run/manifest.json"))
    assert [entry["path"] for entry in manifest["inputs"]] == ["s3://bucket/in/a.jsonl.gz", "s3://bucket/in/b.parquet"]
    assert manifest["status"] == {"ok": 98, "empty_response": 1, "not_text": 1}

    shell("select", "local", "--keep", "10%", "-o", "local.jsonl", "--with-scores", "--rejected", "no.jsonl").done()
    chosen = ("--keep", "10%", "-o", "s3://bucket/out/best.jsonl", "--with-scores")
    told = shell("select", "s3://bucket/run", *chosen, "--rejected", "s3://bucket/out/no.jsonl")
    told.done()
    for name, local in (("best.jsonl", "local.jsonl"), ("no.jsonl", "no.jsonl")):
        assert server.files().cat(f"bucket/out/{name}") == (tmp_path / local).read_bytes()
    compared = shell("compare", "local", "s3://bucket/run", "--resamples", 0)
    assert "1.000" in compared.out + compared.done()
    page = ("report", "s3://bucket/run", "-o", "s3://bucket/out/page.html", "--pictures", "s3://bucket/out/pictures")
    shell(*page).done()
    assert server.files().glob("bucket/out/pictures/*.svg")
    over = ("filter", "s3://bucket/in/*", "-o", "s3://bucket/in/a.jsonl.gz")
    assert "would be overwritten" in shell(*over, *options).line()
    assert b"First of the 10 kept" in server.files().cat("bucket/out/page.html")
    assert "on a disk" in shell("cluster", "s3://bucket/run").line()

    for told_to in (everything(server, "bucket/run"), everything(server, "bucket/out"), told.err.encode()):
        assert SECRET.encode() not in told_to
        assert KEY.encode() not in told_to

    server.files().pipe_file("bucket/in/a.jsonl.gz", gzip.compress(lines[:-1] + b" \n"))
    assert "changed since it was scored" in shell("select", "s3://bucket/run", "-o", "x.jsonl").line()
    assert "inputs changed" in shell("score", "s3://bucket/in/*", "-o", "s3://bucket/run", *options).line()
    shell("score", "s3://bucket/in/*", "-o", "s3://bucket/run", "--fresh", *options).done()
    assert_frame_equal(table(server, "bucket/run"), expected, check_exact=True)


def test_workers_of_ray_write_to_the_store(shell: Shell, server: Server, options: list[object], tmp_path: Path) -> None:
    for name, rows in (("a", alpaca(45)), ("b", alpaca(45, seed=1))):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        server.files().put_file(str(tmp_path / f"{name}.json"), f"bucket/two/{name}.json")
    shell("score", "a.json", "b.json", "-o", "local", *options).done()
    spread = ("--ray", "local", "--workers", 2)
    told = shell("score", "s3://bucket/two/*", "-o", "s3://bucket/spread", *options, *spread).done()
    expected = Run(tmp_path / "local").scores()
    assert_frame_equal(table(server, "bucket/spread"), expected, rel_tol=1e-5, abs_tol=0.0)
    assert SECRET not in told + everything(server, "bucket/spread").decode("utf-8", "replace")


def test_killed_and_resumed(shell: Shell, server: Server, options: list[object], tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(alpaca(600)))
    shell("score", "data.json", "-o", "local", *options).done()
    arguments = ("score", "data.json", "-o", "s3://bucket/killed", *options)
    running = shell.start(*arguments)
    wait(lambda: held(server, "bucket/killed") > 1)
    os.kill(running.pid, signal.SIGSTOP)
    assert "another process is writing this run" in shell(*arguments).line()
    running.kill()
    left = held(server, "bucket/killed")
    assert 1 < left < 30
    assert "is unfinished" in shell("select", "s3://bucket/killed", "-o", "x.jsonl").line()
    assert "resuming after" in shell(*arguments).done()
    expected = Run(tmp_path / "local").scores()
    assert_frame_equal(table(server, "bucket/killed"), expected, check_exact=True)


def test_a_lease_of_another_machine_runs_out(
    shell: Shell, server: Server, options: list[object], tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text(json.dumps(alpaca(40)))
    lease = {"token": "theirs", "host": "another", "processes": "", "process": 1, "until": time.time() + LEASE_SECONDS}
    server.files().pipe_file("bucket/leased/.lock", json.dumps(lease).encode())
    arguments = ("score", "data.json", "-o", "s3://bucket/leased", *options)
    assert "(another, process 1; its lease ends in" in shell(*arguments).line()
    namesake = {"host": platform.node(), "processes": os.readlink("/proc/self/ns/pid"), "process": 2**22}
    server.files().pipe_file("bucket/leased/.lock", json.dumps(lease | namesake).encode())  # of another machine's boot
    assert "its lease ends in" in shell(*arguments).line()
    server.files().pipe_file("bucket/leased/.lock", json.dumps(lease | {"until": time.time() - 1}).encode())
    shell(*arguments).done()
    assert json.loads(server.files().cat("bucket/leased/.lock"))["token"] is None
    server.files().pipe_file("bucket/leased/.lock", b"")  # of a run that was copied from a disk
    assert "complete already" in shell(*arguments).done()
    assert platform.node() in json.loads(server.files().cat("bucket/leased/.lock"))["host"]


def test_the_server_dies_and_comes_back(shell: Shell, server: Server, options: list[object], tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(alpaca(600)))
    shell("score", "data.json", "-o", "local", *options).done()
    server.files().put_file(str(tmp_path / "data.json"), "bucket/dies.json")
    arguments = ("score", "s3://bucket/dies.json", "-o", "s3://bucket/dies", *options)
    running = shell.start(*arguments)
    wait(lambda: held(server, "bucket/dies") > 1)
    server.stop()
    selecting = shell.start("select", "s3://bucket/dies", "-o", "x.jsonl")
    ended = running.end()
    assert ended.code == 1, ended
    assert "the same command resumes" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    ended = selecting.end()
    assert ended.code == 1, ended
    assert ended.err.count("\n") == 1

    server.start()
    wait(lambda: _answers(server))
    assert held(server, "bucket/dies") < 30
    assert "resuming after" in shell(*arguments).done()
    expected = Run(tmp_path / "local").scores()
    assert_frame_equal(table(server, "bucket/dies"), expected, check_exact=True)


def _answers(server: Server) -> bool:
    try:
        return bool(server.files().cat("bucket/dies/manifest.json"))
    except (OSError, BotoCoreError):
        return False


def test_names_that_look_like_patterns_are_names(
    shell: Shell, server: Server, options: list[object], tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text(json.dumps(alpaca(40)))
    server.files().pipe_file("bucket/odd/a[1].json", (tmp_path / "data.json").read_bytes())
    server.files().pipe_file("bucket/odd/run1/scores/part-00000.parquet", b"of another run")
    server.files().touch("bucket/odd/run[1]/")  # as consoles mark an empty folder
    arguments = ("score", "s3://bucket/odd/a[1].json", "-o", "s3://bucket/odd/run[1]", *options)
    shell(*arguments).done()
    assert "loading" in shell(*arguments, "--fresh").done()
    assert server.files().cat("bucket/odd/run1/scores/part-00000.parquet") == b"of another run"


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (("s3://bucket/x.json", "-o", "run"), {"AWS_SECRET_ACCESS_KEY": "wrong"}, "credentials"),
        (("data.json", "-o", "s3://bucket/r"), {"AWS_SECRET_ACCESS_KEY": "wrong"}, "credentials"),
        (("data.json", "-o", "s3://bucket/r"), {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials"),
        (("s3://missing/x.json", "-o", "run"), {}, "s3://missing/x.json"),
        (("data.json", "-o", "s3://missing/run"), {}, "check the bucket"),
        (("s3://bucket/none.json", "-o", "run"), {}, "no such object"),
        (("s3://bucket/none*.json", "-o", "run"), {}, "no object matches"),
        (("s3://bucket/in", "-o", "run"), {}, "unknown kind of file"),
        (("s3://*/x.json", "-o", "run"), {}, "s3://BUCKET/KEY"),
        (("s3://bucket/asked/*.json", "-o", "run"), {}, "s3://bucket/asked/why?.json: a URL can't contain a ?"),
        (("gs://bucket/x.json", "-o", "run"), {}, "s3://BUCKET/KEY"),
        (("s3://key:secret@bucket/x.json", "-o", "run"), {}, "belong in the environment"),
    ],
)
def test_what_is_wrong_is_one_line(
    shell: Shell, options: list[object], tmp_path: Path, arguments: tuple[str, ...], env: dict[str, str], words: str
) -> None:
    shell.server.files().pipe_file("bucket/asked/why?.json", b"[]")
    (tmp_path / "data.json").write_text(json.dumps(alpaca(5)))
    line = shell("score", *arguments, *options, **env).line()
    assert words in line
    assert "secret" not in line
    assert not (tmp_path / "run").exists()


def test_with_nothing_installed_beside_the_extra(server: Server, options: list[object], tmp_path: Path) -> None:
    alone = make_environment(tmp_path, build_wheel(tmp_path / "wheel"), "s3")
    ended = alone("scorer", "score", "alpaca.json", "-o", "s3://bucket/alone", *options, **server.environment)
    assert ended.returncode == 0, ended.stderr
    select = ["select", "s3://bucket/alone", "--keep", "10%", "--no-max-ifd", "-o", "s3://bucket/alone.jsonl"]
    ended = alone("scorer", *select, **server.environment)
    assert ended.returncode == 0, ended.stderr
    assert "kept 15 of 153 records: s3://bucket/alone.jsonl" in ended.stderr


COPIES = """
import sys
from scorer.data import dataset

opened = []

class Counted(dataset.InputReader):
    def __init__(self, path, **options):
        opened.append(path)
        super().__init__(path, **options)

dataset.InputReader = Counted
for free in (1 << 40, 0):
    dataset._free_bytes = lambda: free
    opened.clear()
    with dataset.Dataset(sys.argv[1:]) as data:
        data.inspect()
        print(sum(1 for _ in data.rows()), len(opened), len(data._readers))
"""


def test_an_object_is_copied_once_while_there_is_room(server: Server) -> None:
    urls = [f"s3://bucket/once/{name}.jsonl" for name in "ab"]
    for url in urls:
        server.files().pipe(url.removeprefix("s3://"), b"".join(json.dumps(row).encode() + b"\n" for row in alpaca(3)))
    command = [sys.executable, "-c", COPIES, *urls]
    done = subprocess.run(
        command, env=os.environ | server.environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout == "6 2 2\n6 4 1\n"
