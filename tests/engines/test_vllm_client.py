"""The remote engine against a real vLLM server: killed, started again, and sent invalid requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import psutil
import pytest
import urllib3

from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from tests.lib.command import CONSOLE_SCRIPT, SECONDS, Commands, alive, alpaca, shards, wait

pytestmark = pytest.mark.slow
Tiny = Callable[[str], ModelFiles]
KEY = "not-a-secret"
LEVEL = "VLLM_LOGGING_LEVEL"  # set by TRL where it is imported


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(files: ModelFiles, port: int, log: Path, **env: str) -> Iterator[psutil.Process]:
    """`scorer serve` until it answers, and its end with all that it started."""
    command = [CONSOLE_SCRIPT, "serve", "--model", files.path, "--port", port, "--dtype", "float32", "--device", "cpu"]
    command += ["--vllm-arg", f"kv_cache_memory_bytes={64 << 20}"]  # instead of 2 GiB, whose pages take seconds to fill
    with log.open("wb") as output:
        process = psutil.Popen(
            list(map(str, command)),
            stdout=output,
            stderr=output,
            env={k: v for k, v in os.environ.items() if k != LEVEL} | {"VLLM_API_KEY": KEY} | env,
            start_new_session=True,
        )
    try:
        wait_for(port, process, log)
        assert re.search(r"INFO \d\d-\d\d ", log.read_text()), "a server shows vLLM's log"
        yield process
    finally:
        kill_all(process)


def wait_for(port: int, process: psutil.Process, log: Path) -> None:
    latest = time.monotonic() + SECONDS
    while time.monotonic() < latest:
        assert alive(process), log.read_text()
        try:
            urllib3.request("GET", f"http://127.0.0.1:{port}/health", retries=False, timeout=2)
            return
        except urllib3.exceptions.HTTPError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def kill_all(process: psutil.Process) -> None:
    """kill -9 of a server and of all that it started."""
    psutil.wait_procs(signal_all(process, signal.SIGKILL), timeout=60)


def signal_all(process: psutil.Process, number: signal.Signals) -> list[psutil.Process]:
    try:
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []
    for member in family:
        member.send_signal(number)
    return family


def assert_same(one: pl.DataFrame, two: pl.DataFrame) -> None:
    for column in ("record_id", "status", "response_tokens", "alone_tokens"):
        assert one[column].equals(two[column])
    for column in ("nll_conditioned", "nll_alone"):
        assert ((one[column] - two[column]).abs() / two[column]).max() < 1e-4  # type: ignore[operator]


def test_a_served_model_scores_and_comes_back_in_the_middle(tiny: Tiny, tmp_path: Path, temporary: Path) -> None:
    """The table of the packed engine; errors for invalid requests; a run continues when its server is back."""
    files, port = tiny("gpt2"), free_port()
    url = f"http://127.0.0.1:{port}"
    rows = [*alpaca(200), {"instruction": "no answer", "output": ""}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    command, common = Commands(tmp_path), ("score", "data.json", "--model", files.path)
    command(*common, "-o", "local", "--engine", "packed", "--dtype", "float32", "--device", "cpu").done()
    expected = Run(tmp_path / "local").scores()

    with serving(files, port, tmp_path / "server.log", TMPDIR=str(temporary)) as server:
        command(*common, "-o", "served", "--engine", url, VLLM_API_KEY=KEY).done()
        assert_same(Run(tmp_path / "served").scores(), expected)
        manifest = Run(tmp_path / "served").manifest
        assert (manifest.server or {})["dtype"] == "float32"
        assert KEY not in manifest.to_json()
        assert str(port) not in json.dumps(manifest.identity)

        pool = urllib3.PoolManager(headers={"Authorization": f"Bearer {KEY}"})
        for sequence, words in (
            ({"token_ids": [1, 2, 3], "spans": [[1, 4]]}, "ascending"),
            ({"token_ids": [1, 2, 3], "spans": [[2, 3], [1, 2]]}, "ascending"),
            ({"token_ids": [1, 2, 3], "spans": [[0, 3]]}, "ascending"),
            ({"token_ids": [1, 257], "spans": [[1, 2]]}, "vocabulary"),
            ({"token_ids": [1] * 1025, "spans": [[1, 2]]}, "more than the 1024"),
            ({"token_ids": [1], "spans": [[1, 1]]}, ""),
            ({"token_ids": ["a", "b"], "spans": [[1, 2]]}, ""),
        ):
            answer = pool.request("POST", f"{url}/v1/scorer/score", json={"sequences": [sequence]})
            assert answer.status in (400, 422), answer.data
            assert words in answer.data.decode()
        for arguments, key, words in (
            (common, "wrong", "API key"),
            ((*common, "--dtype", "bfloat16"), KEY, "computes in float32"),
            ((*common, "--batch-tokens", 9), KEY, "the server sets this"),
            (("score", "data.json", "--model", tiny("llama").path), KEY, "differ in"),
        ):
            assert words in command(*arguments, "-o", "other", "--engine", url, VLLM_API_KEY=key).line()

        # Silent after the first shards of a run, which Ctrl-C ends all the same; killed in the next part of it, and
        # started again while that waits.
        in_parts = (*common, "-o", "cut", "--engine", url, "--shard-rows", 5)
        cut = command.start(*in_parts, VLLM_API_KEY=KEY)
        wait(lambda: shards(tmp_path / "cut") >= 3)
        signal_all(server, signal.SIGSTOP)
        time.sleep(2)  # in which it asks for what is not answered
        ended = cut.kill(signal.SIGINT)
        signal_all(server, signal.SIGCONT)
        assert ended.code == 130, ended
        assert "Traceback" not in ended.err
        before = shards(tmp_path / "cut")
        cut = command.start(*in_parts, VLLM_API_KEY=KEY, SCORER_SERVER_WAIT="600")
        wait(lambda: shards(tmp_path / "cut") >= before + 3)
        family = server.children(recursive=True)
        server.kill()  # kill -9 of one process ends the others
        _, left = psutil.wait_procs([server, *family], timeout=30)
        assert not left, left
        assert cut.process.exitcode is None, "it ended before the server did"
    early = command.start(*common, "-o", "early", "--engine", url, VLLM_API_KEY=KEY, SCORER_SERVER_WAIT="600")
    log = tmp_path / "server2.log"
    killed = set(temporary.glob("scorer-*"))  # what the kill -9 left
    with serving(files, port, log, TMPDIR=str(temporary)) as server:
        (folder,) = set(temporary.glob("scorer-*")) - killed
        assert any(path.is_socket() for path in folder.iterdir())
        for waiting, run in ((cut, "cut"), (early, "early")):
            notes = re.findall(
                r"(?m)^(http\S+) does not answer \(.*\); waiting for it for up to 600 s$", waiting.end().done()
            )
            assert notes == [url]
            assert_same(Run(tmp_path / run).scores(), expected)
        wait(lambda: f"scorer: ready at {url}\n" in log.read_text())
        family = signal_all(server, signal.SIGINT)  # as a terminal does
        _, left = psutil.wait_procs(family, timeout=10)
        assert not left, left
        assert not folder.exists()


def test_what_cannot_be_served_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    """Before weights are loaded: vLLM itself would print its log and a traceback."""
    unknown = tmp_path / "perceptron"
    shutil.copytree(tiny("gpt2").path, unknown, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((unknown / "config.json").read_text()) | {"architectures": ["PerceptronForCausalLM"]}
    (unknown / "config.json").write_text(json.dumps(settings))
    command = Commands(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, words in (
            (("--model", unknown), "whose architecture is PerceptronForCausalLM"),
            (("--vllm-arg", "block_size=large"), "block_size"),
            (("--port", taken.getsockname()[1]), "Address already in use"),
        ):
            given = ("serve", "--model", tiny("gpt2").path, "--device", "cpu", "--port", free_port(), *arguments)
            assert words in command(*given, VLLM_LOGGING_LEVEL="ERROR").line()


def test_what_is_no_scoring_server_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('[{"instruction": "a", "output": "some text"}]')
    port = free_port()

    def ask() -> str:
        asked = ("score", "d.json", "-o", "r", "--model", tiny("gpt2").path, "--engine", f"http://127.0.0.1:{port}")
        return Commands(tmp_path)(*asked).line()

    with subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as web:
        try:
            wait(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            assert "does not score: start it with `scorer serve`" in ask()
            for page in ("<p>Log in", '{"error": 1}'):  # which answers every path, as proxies do
                (tmp_path / "v1" / "scorer").mkdir(parents=True, exist_ok=True)
                (tmp_path / "v1" / "scorer" / "model").write_text(page)
                assert "answers, but not as `scorer serve`" in ask()
        finally:
            web.kill()
