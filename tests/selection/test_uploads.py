"""Selections that are written to datasets on the hub."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.lib.command import Ended, alpaca, end, start
from tests.lib.hub import Hub
from tests.lib.runs import make_run

ROWS = alpaca(4)
BEST = [ROWS[1], ROWS[3]]
Select = Callable[..., Ended]


def run_command(hub: Hub, folder: Path, *arguments: object, token: str = "hf_member", **environment: str) -> Ended:
    """The command, in a process of its own: huggingface_hub reads the environment when it is imported."""
    place = hub.environment(folder) | {
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
    }
    return end(start(folder, *arguments, **(place | environment)))


@pytest.fixture
def select(hub: Hub, tmp_path: Path) -> Select:
    """`scorer select` of the best two of four records, with a token that may write to the datasets of org."""
    make_run(tmp_path / "run", ROWS, ifd=[0.1, 0.4, 0.2, 0.3])
    (tmp_path / "tmp").mkdir()
    return partial(run_command, hub, tmp_path, "select", "run", "--keep", 2)


def rows(content: bytes) -> list[Any]:
    return [json.loads(line) for line in content.splitlines()]


def test_both_files_are_one_commit(select: Select, hub: Hub, tmp_path: Path) -> None:
    best, rejected = "hf://datasets/org/plain/data/best.parquet", "hf://datasets/org/plain@main/rejected.jsonl"
    assert f"kept 2 of 4 records: {best}" in select("-o", best, "--rejected", rejected).done()
    (commit,) = hub.commits
    assert (commit.name, commit.branch) == ("org/plain", "main")
    assert list(commit.files) == ["data/best.parquet", "rejected.jsonl"]
    assert pq.read_table(io.BytesIO(commit.files["data/best.parquet"])).to_pylist() == BEST
    assert [row["n"] for row in rows(commit.files["rejected.jsonl"])] == [0, 2]
    assert hub.created == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_branch_and_a_file_here(select: Select, hub: Hub, tmp_path: Path) -> None:
    select("-o", "hf://datasets/org/plain@v2%2Fdraft/best.jsonl", "--rejected", "rejected.jsonl").done()
    (commit,) = hub.commits
    assert commit.branch == "v2/draft"
    assert rows(commit.files["best.jsonl"]) == BEST
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 2


def test_a_new_dataset_is_private(select: Select, hub: Hub) -> None:
    select("-o", "hf://datasets/me/new/best.jsonl").done()
    assert hub.created == [{"name": "new", "organization": "me", "visibility": "private", "type": "dataset"}]
    assert [commit.name for commit in hub.commits] == ["me/new"]


def test_an_upload_that_fails_leaves_neither_file(select: Select, hub: Hub, tmp_path: Path) -> None:
    hub.full = "org/plain"
    line = select("-o", "hf://datasets/org/plain/best.jsonl", "--rejected", "rejected.jsonl").line()
    assert "hf://datasets/org/plain/best.jsonl: you may not write to https://huggingface.co/datasets/org/plain" in line
    assert "(the hub says: Private storage limit reached)" in line
    assert hub.commits == []
    assert not (tmp_path / "rejected.jsonl").exists()


def test_the_second_dataset_fails(select: Select, hub: Hub) -> None:
    hub.full = "org/splits"
    best, rejected = "hf://datasets/org/plain/best.jsonl", "hf://datasets/org/splits/rejected.jsonl"
    line = select("-o", best, "--rejected", rejected).line()
    assert line.startswith(f"scorer: {rejected}: you may not write")
    assert line.endswith(f"; uploaded already: {best}\n")
    assert [commit.name for commit in hub.commits] == ["org/plain"]


def test_a_path_that_the_dataset_ignores(select: Select) -> None:
    line = select("-o", "hf://datasets/org/plain/drafts/best.jsonl").line()
    assert "org/plain: uploaded without drafts/best.jsonl, which its .gitignore has; name another" in line


FAULTS = {
    "a folder": ("hf://datasets/org/plain/best/", "name a file, such as hf://datasets/org/plain/best/best.parquet"),
    "no path": ("hf://datasets/org/best.parquet", "write hf://datasets/ORG/NAME[@BRANCH]/PATH.parquet"),
    "a model": ("hf://org/plain/best.parquet", "write hf://datasets/ORG/NAME[@BRANCH]/PATH.parquet"),
    "a path that leaves the dataset": ("hf://datasets/org/plain/../best.parquet", "not a file on the hub"),
    "a pattern": ("hf://datasets/org/plain/*.parquet", "not a file on the hub"),
    "an unknown kind": ("hf://datasets/org/plain/best.txt", "unknown kind of file"),
    "no such branch": ("hf://datasets/org/plain@v3/best.jsonl", "the dataset has no branch 'v3'"),
    "a tag": ("hf://datasets/org/plain@v1.0/best.jsonl", "the dataset has no branch 'v1.0'"),
    "a branch of a new dataset": ("hf://datasets/me/new@v3/best.jsonl", "a new one has no branch 'v3'"),
    "somebody else's": ("hf://datasets/other/data/best.jsonl", "you may not write to https://huggingface.co/"),
    "a new one of somebody else": (
        "hf://datasets/other/new/best.jsonl",
        "you may not write to https://huggingface.co/",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_before_anything_is_scored(hub: Hub, tmp_path: Path, fault: str) -> None:
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    output, told = FAULTS[fault]
    line = run_command(hub, tmp_path, "filter", "data.json", "--run", "new", "-o", output).line()
    assert line.startswith(f"scorer: {output}: ")
    assert told in line
    assert not (tmp_path / "new").exists()
    assert not hub.created
    assert not hub.commits


def test_tokens_that_do_not_write(select: Select, hub: Hub) -> None:
    for token in ("", "hf_reader", "hf_wrong"):
        for name in ("org/plain", "me/new"):
            line = select("-o", f"hf://datasets/{name}/best.jsonl", token=token).line()
            assert f"you may not write to https://huggingface.co/datasets/{name}: run `hf auth login`, or set" in line
    assert not hub.created
    assert not hub.commits


def test_no_hub(select: Select, hub: Hub) -> None:
    output = "hf://datasets/org/plain/best.jsonl"
    offline = select("-o", output, HF_HUB_OFFLINE="1").line()
    assert f"{output}: HF_HUB_OFFLINE is set: unset it, or write to a file here" in offline
    ended = select("-o", output, HF_ENDPOINT="http://127.0.0.1:9")
    assert ended.code == 1
    assert f"{output}: the hub can't be reached (" in ended.err
    hub.status = 500
    ended = select("-o", output)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert f"{output}: the hub fails (" in ended.err


def test_options_that_do_not_go_with_it(select: Select, hub: Hub, tmp_path: Path) -> None:
    output = "hf://datasets/org/plain/best.jsonl"
    twice = select("-o", output, "--rejected", "hf://datasets/org/plain@main/best.jsonl").line()
    assert "hf://datasets/org/plain@main/best.jsonl would be overwritten" in twice
    assert "a file beside the output" in select("-o", output, "--as", "alpaca", "--dataset-info").line()
    line = run_command(hub, tmp_path, "filter", "run.jsonl", "-o", output).line()
    assert "name a directory with --run RUN" in line
    assert hub.commits == []
