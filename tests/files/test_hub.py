"""Datasets on the hub: a server on this machine speaks what huggingface_hub asks, and holds a few datasets.

Each look is in a process of its own: huggingface_hub reads the environment when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from scorer.data.dataset import Dataset

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONVERTED = "refs/convert/parquet"
LINE = b'{"instruction": "Say it.", "output": "It."}\n'
CARD = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/part-*
  - split: test
    path: en/held.jsonl
- config_name: de
  data_files: de.csv
---
# Two languages
"""
DATASETS: dict[str, dict[str, bytes]] = {
    "org/plain": {".gitattributes": b"", "README.md": b"# Plain\n", "a.jsonl": LINE, "b.jsonl": LINE * 2},
    "org/splits": {
        "data/train-00000-of-00002.jsonl": LINE,
        "data/train-00001-of-00002.jsonl": LINE * 2,
        "data/test-00000-of-00001.jsonl": LINE,
        "dataset_infos.json": b"{}",
    },
    "org/subsets": {
        "README.md": CARD,
        "en/part-0.jsonl": LINE,
        "en/part-1.jsonl": LINE,
        "en/held.jsonl": LINE,
        "de.csv": b"instruction,output\na,b\n",
    },
    "org/script": {"script.py": b"", "data.zip": b""},
    "org/gated": {"train.jsonl": LINE},
}
REVISIONS = {"org/plain": (CONVERTED, "v1.0")}  # beside main and the commit
LOOK = """
import json, sys
from scorer.files.inputs import input_files
from scorer.types import ScorerError
found = []
for path, options in json.loads(sys.argv[1]):
    try:
        found.append(input_files(path, **options))
    except ScorerError as error:
        found.append(f"{error.exit_code} {error}")
print(json.dumps(found))
"""


@dataclass
class Hub:
    """The server: `asked` has the paths that were asked for; `status` other than 200 is its answer to everything."""

    address: str
    asked: list[str] = field(default_factory=list)
    status: int = 200

    def look(self, cache: Path, *wanted: tuple[str, dict[str, str]], **environment: str) -> list[Any]:
        """What `input_files` finds for each, or the exit code and the text of its error."""
        names = {"HF_ENDPOINT": self.address, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        command = [sys.executable, "-c", LOOK, json.dumps(wanted)]
        ended = subprocess.run(
            command, env=kept | names | environment, cwd=cache, capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        return list(json.loads(ended.stdout))


class Handler(BaseHTTPRequestHandler):
    """GET api/datasets/NAME[/revision/REVISION], and GET and HEAD datasets/NAME/resolve/REVISION/PATH."""

    hub: Hub

    def do_GET(self) -> None:
        self._answer(*self._found(), with_body=True)

    def do_HEAD(self) -> None:
        self._answer(*self._found(), with_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _found(self) -> tuple[int, str, bytes]:
        """The status, the code of the error, and the body."""
        path = self.path.replace("%2F", "/").partition("?")[0].strip("/").removeprefix("api/").split("/")
        self.hub.asked.append("/".join(path))
        if self.hub.status != 200:
            return self.hub.status, "", b""
        name, rest = "/".join(path[1:3]), path[3:]
        files = DATASETS.get(name)
        if files is None:
            return 404, "RepoNotFound", b""
        allowed = ("main", COMMIT, *REVISIONS.get(name, ()))
        at = "/".join(rest[1:])
        if not rest or (rest[0] == "revision" and at in allowed):
            siblings = [{"rfilename": file} for file in files]
            return 200, "", json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
        revision = next((known for known in allowed if at.startswith(f"{known}/")), None)
        if revision is None:
            return 404, "RevisionNotFound", b""
        if name == "org/gated" and self.headers["Authorization"] != "Bearer hf_member":
            return 403, "GatedRepo", b""
        content = files.get(at.removeprefix(f"{revision}/"))
        return (404, "EntryNotFound", b"") if content is None else (200, "", content)

    def _answer(self, status: int, code: str, body: bytes, *, with_body: bool) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.serve_forever, daemon=True).start()
        yield Handler.hub
        server.shutdown()


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.asked.clear()
    server.status = 200
    return server


def names(paths: list[str]) -> list[str]:
    """The paths in the dataset, of paths in the cache's folder of the commit."""
    assert all(Path(path).is_file() and f"/snapshots/{COMMIT}/" in path for path in paths), paths
    return [path.partition(f"/snapshots/{COMMIT}/")[2] for path in paths]


def test_the_files_that_an_address_means(hub: Hub, tmp_path: Path) -> None:
    train = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    test = ["data/test-00000-of-00001.jsonl"]
    wanted: list[tuple[str, dict[str, str], list[str]]] = [
        ("org/plain", {}, ["a.jsonl", "b.jsonl"]),
        ("hf://datasets/org/plain", {}, ["a.jsonl", "b.jsonl"]),
        (f"hf://datasets/org/plain@{COMMIT}/a.jsonl", {}, ["a.jsonl"]),
        (f"hf://datasets/org/plain@{CONVERTED}/b.jsonl", {}, ["b.jsonl"]),
        ("hf://datasets/org/plain@refs%2Fconvert%2Fparquet", {}, ["a.jsonl", "b.jsonl"]),
        ("org/plain@v1.0", {}, ["a.jsonl", "b.jsonl"]),
        ("org/splits", {}, train),
        ("org/splits", {"split": "test"}, test),
        ("hf://datasets/org/splits/data/*.jsonl", {}, [*test, *train]),
        ("hf://datasets/org/splits/*.jsonl", {}, []),
        ("hf://datasets/org/splits/data", {}, train),
        ("org/subsets", {"subset": "en"}, ["en/part-0.jsonl", "en/part-1.jsonl"]),
        ("org/subsets", {"subset": "en", "split": "test"}, ["en/held.jsonl"]),
        ("org/subsets", {"subset": "de"}, ["de.csv"]),
    ]
    found = hub.look(tmp_path, *((path, options) for path, options, _ in wanted))
    for (path, options, expected), one in zip(wanted, found, strict=True):
        if expected:
            assert names(one) == expected, (path, options)
        else:
            assert one == f"2 {path}: the dataset has no such file; see https://huggingface.co/datasets/org/splits"
    with Dataset(found[6]) as data:
        data.inspect()
        assert data.counts == (1, 2)


def test_what_the_user_has_to_mend(hub: Hub, tmp_path: Path) -> None:
    wanted: list[tuple[str, dict[str, str], str]] = [
        ("org/missing", {}, "no such file or folder here, and no such dataset on the hub"),
        ("hf://datasets/org/missing", {}, "hf://datasets/org/missing: no such dataset on the hub"),
        ("org/plain@v2", {}, "has no revision 'v2'"),
        (
            "org/gated",
            {},
            "access is restricted; ask for it at https://huggingface.co/datasets/org/gated, then run `hf",
        ),
        ("org/splits", {"split": "dev"}, "there is no split 'dev'; --split takes one of: test, train"),
        ("org/subsets", {}, "several subsets; choose one with --subset: en, de"),
        ("org/subsets", {"subset": "fr"}, "there is no subset 'fr'; --subset takes one of: en, de"),
        ("org/script", {}, "there is no file (data.zip, script.py) of a kind that scorer reads"),
        ("hf://datasets/org/plain/a.jsonl", {"split": "train"}, "leave out --split"),
        ("hf://datasets/plain", {}, "write hf://datasets/ORG/NAME"),
        ("hf://models/org/plain", {}, "write hf://datasets/ORG/NAME"),
    ]
    found = hub.look(tmp_path, *((path, options) for path, options, _ in wanted))
    for (path, _, told), one in zip(wanted, found, strict=True):
        assert one.startswith(f"2 {path}: "), one
        assert told in one
        assert "\n" not in one


def test_a_token_opens_a_gated_dataset(hub: Hub, tmp_path: Path) -> None:
    (found,) = hub.look(tmp_path, ("org/gated", {}), HF_TOKEN="hf_member")
    assert names(found) == ["train.jsonl"]


def test_local_names_are_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    paths = ["org/data.jsonl", "org/data.xlsx", "here/nothing", "org/a/b", "../org", "nothing"]
    assert hub.look(tmp_path, *((path, {}) for path in paths)) == [[path] for path in paths]
    assert hub.asked == []


def test_the_cache_serves_without_a_network(hub: Hub, tmp_path: Path) -> None:
    wanted: tuple[str, dict[str, str]] = ("org/splits", {})
    (online,) = hub.look(tmp_path, wanted)
    assert f"datasets/org/splits/resolve/{COMMIT}/data/train-00001-of-00002.jsonl" in hub.asked
    hub.asked.clear()
    found = hub.look(tmp_path, wanted, ("org/splits", {"split": "test"}), ("org/plain", {}), HF_HUB_OFFLINE="1")
    assert hub.asked == []
    assert found[0] == online
    assert found[1].startswith("2 org/splits: there is no split 'test'")
    assert found[2].startswith("2 org/plain: no such file or folder here, and not whole in the hub's cache")
    Path(online[1]).unlink()
    (found,) = hub.look(tmp_path, wanted, HF_HUB_OFFLINE="1")
    assert "1 of the 2 files data/train-*.jsonl are there; run it without HF_HUB_OFFLINE" in found


def test_a_hub_that_fails(hub: Hub, tmp_path: Path) -> None:
    hub.status = 500
    (found,) = hub.look(tmp_path, ("org/plain", {}))
    assert found.startswith("1 org/plain: the hub fails (")
    (found,) = hub.look(tmp_path, ("org/plain", {}), HF_ENDPOINT="http://127.0.0.1:9")
    assert found.startswith("1 org/plain: no such file or folder here, and the hub can't be reached (")
    hub.status = 401
    (found,) = hub.look(tmp_path, ("hf://datasets/org/plain", {}))
    assert found.startswith("2 hf://datasets/org/plain: ")
