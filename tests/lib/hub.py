"""A server on this machine that speaks what huggingface_hub asks, and holds a few datasets."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

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
    "other/data": {"train.jsonl": LINE},
}
IGNORED = "drafts/best.jsonl"  # by the .gitignore of every dataset
BRANCHES = ("main", "v2/draft")  # that can be written to
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
TOKENS = {"Bearer hf_member": "write", "Bearer hf_reader": "read"}  # of the user me, who may write to what org has


class Commit(NamedTuple):
    """A commit that the server took: the files in it by their paths."""

    name: str
    branch: str
    files: dict[str, bytes]


@dataclass
class Hub:
    """The server: `asked` has the paths that were asked for; `status` other than 200 is its answer to everything.

    `created` has what was asked to be created, `commits` what was uploaded; commits to the dataset `full` are refused.
    """

    address: str
    asked: list[str] = field(default_factory=list)
    created: list[dict[str, str]] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    status: int = 200
    full: str = ""

    def clear(self) -> None:
        for seen in (self.asked, self.created, self.commits):
            seen.clear()
        self.status, self.full = 200, ""

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs to find the server."""
        return {"HF_ENDPOINT": self.address, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def look(self, cache: Path, *wanted: tuple[str, dict[str, str]], **environment: str) -> list[Any]:
        """What `input_files` finds for each, or the exit code and the text of its error."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        command = [sys.executable, "-c", LOOK, json.dumps(wanted)]
        ended = subprocess.run(
            command,
            env=kept | self.environment(cache) | environment,
            cwd=cache,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr
        return list(json.loads(ended.stdout))


class Handler(BaseHTTPRequestHandler):
    """What is read: GET api/datasets/NAME[/revision/REVISION], GET and HEAD datasets/NAME/resolve/REVISION/PATH.

    What is written: GET api/whoami-v2 and api/datasets/NAME/auth-check/write and /refs, POST api/repos/create and
    api/datasets/NAME/preupload, /commit and /paths-info, each with /BRANCH.
    """

    hub: Hub

    def do_GET(self) -> None:
        self._answer(*self._found(), with_body=True)

    def do_HEAD(self) -> None:
        self._answer(*self._found(), with_body=False)

    def do_POST(self) -> None:
        path = self.path.replace("%2F", "/").strip("/").removeprefix("api/").split("/")
        self.hub.asked.append("/".join(path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(*self._changed(path, body), with_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _found(self) -> tuple[int, str, bytes]:
        """The status, the code of the error, and the body."""
        path = self.path.replace("%2F", "/").partition("?")[0].strip("/").removeprefix("api/").split("/")
        self.hub.asked.append("/".join(path))
        if self.hub.status != 200:
            return self.hub.status, "", b""
        if path == ["whoami-v2"]:
            return self._user()
        name, rest = "/".join(path[1:3]), path[3:]
        files = DATASETS.get(name)
        if files is None:
            return 404, "RepoNotFound", b""
        if rest == ["auth-check", "write"]:
            may = name.startswith("org/") and TOKENS.get(self.headers["Authorization"]) == "write"
            return (200, "", b"") if may else (403, "", b"")
        if rest == ["refs"]:
            branches = [{"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": COMMIT} for branch in BRANCHES]
            return 200, "", json.dumps({"branches": branches, "converts": [], "tags": [], "pullRequests": []}).encode()
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

    def _user(self) -> tuple[int, str, bytes]:
        role = TOKENS.get(self.headers["Authorization"])
        user = {"name": "me", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": role}}}
        return (401, "", b"") if role is None else (200, "", json.dumps(user).encode())

    def _changed(self, path: list[str], body: bytes) -> tuple[int, str, bytes]:
        if TOKENS.get(self.headers["Authorization"]) != "write":
            return 403, "", b""
        if path == ["repos", "create"]:
            self.hub.created.append(json.loads(body))
            return 200, "", json.dumps({"url": f"{self.hub.address}/datasets/me/new"}).encode()
        name, action, branch = "/".join(path[1:3]), path[3], "/".join(path[4:])
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": path == IGNORED} for path in paths]
            return 200, "", json.dumps({"files": modes}).encode()
        if action == "commit":
            if name == self.hub.full:
                return 403, "", b'{"error": "Private storage limit reached"}'
            lines = [json.loads(line) for line in body.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            files = {file["path"]: base64.b64decode(file["content"]) for file in added}
            self.hub.commits.append(Commit(name, branch, files))
            page = f"{self.hub.address}/datasets/{name}/commit/{COMMIT}"
            return 200, "", json.dumps({"commitUrl": page, "commitOid": COMMIT}).encode()
        held = [{"type": "file", "path": file, "oid": "", "size": 1} for file in self.hub.commits[-1].files]
        return 200, "", json.dumps(held).encode()

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


@contextmanager
def serving() -> Iterator[Hub]:
    """The server, while the block runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.serve_forever, daemon=True).start()
        yield Handler.hub
        server.shutdown()
