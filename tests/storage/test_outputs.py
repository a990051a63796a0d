"""Outputs: what may be replaced, what is written through, and what is refused before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from scorer.runs import directory
from scorer.runs.directory import Run
from scorer.storage.atomic import is_stream, remove_temporaries, replacing
from scorer.storage.outputs import RUN_FILES, RUN_FOLDERS, check_outside_runs, check_writable
from scorer.types import ScorerError
from tests.lib.command import CONSOLE_SCRIPT, Commands, bash
from tests.lib.runs import make_run

ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(4)]
NOT_UTF8 = os.fsdecode(b"n\xff")
IFD = [0.1, 0.2, 0.3, 0.4]  # the best is row 3
BEST = json.dumps(ROWS[3]) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", ROWS, ifd=IFD)


@pytest.fixture
def command(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def shell(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which $S is the command, and what ends it well is a selection of one record."""
    return bash(folder, f"S='{CONSOLE_SCRIPT} select run --keep 1'; {line}")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_mode_is_that_of_the_file_before_or_of_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "a"
    umask = os.umask(0o027)
    try:
        for before, after in ((None, 0o640), (0o600, 0o600), (0o444, 0o444), (0o666, 0o666)):
            if before is not None:
                path.chmod(before)
            with replacing(path) as temporary:
                assert mode(temporary) in (0o600, 0o640)  # never more than it will be
                temporary.write_text("x")
            assert mode(path) == after
    finally:
        os.umask(umask)


def test_a_temporary_file_is_new_and_is_cleared_by_its_pattern(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as two:
        assert one != two
        assert one.read_bytes() == b""
        assert one.parent == tmp_path
        remove_temporaries(tmp_path / "a")
        assert not one.exists()
        one.write_text("1")
        two.write_text("2")
    assert (tmp_path / "a").read_text() == "1"  # the last to be renamed
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_hard_link_keeps_what_it_had(run: Run, command: Commands, tmp_path: Path) -> None:
    data = tmp_path / "run.jsonl"
    before = data.read_bytes()
    (tmp_path / "hard.jsonl").hardlink_to(data)
    (tmp_path / "soft.jsonl").symlink_to(data)
    (tmp_path / "folder").symlink_to(tmp_path)
    command("select", "run", "-o", "hard.jsonl", "--keep", 1).done()
    for name in ("soft.jsonl", "folder/run.jsonl", "run/../run.jsonl"):
        assert "would be overwritten" in command("select", "run", "-o", name).line()
    assert data.read_bytes() == before
    assert (tmp_path / "hard.jsonl").read_text() == BEST


NAMES_OF_RUNS = (
    *(getattr(directory, name) for name in ("MANIFEST", "LOCK", "CLUSTERS", "FLAGS", "EMBEDDINGS")),
    *directory.COPIES,
    "scores/part-00000.parquet",
    "embeddings/part-00000.npy",
    "epoch-0/manifest.json",
    "checkpoints/checkpoint-7/model.safetensors",
)


@pytest.mark.parametrize("name", NAMES_OF_RUNS)
def test_what_belongs_to_a_run_is_no_output(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(run.path / name)
    for path in (run.path / name, tmp_path / "link", run.path / "scores" / ".." / name):
        with pytest.raises(ScorerError, match="would replace a part of the run"):
            check_writable(path)
    (tmp_path / "plain").mkdir()
    check_outside_runs(tmp_path / "plain" / name)
    check_writable(run.path / "kept.jsonl")
    assert directory.LOCK in RUN_FILES
    assert name.partition("/")[0] in {*RUN_FILES, *RUN_FOLDERS} or name.startswith(("data.", "epoch-"))


def test_no_command_replaces_a_part_of_any_run(run: Run, command: Commands, tmp_path: Path) -> None:
    make_run(tmp_path / "other", ROWS, ifd=IFD)
    (tmp_path / "link.jsonl").symlink_to("other/scores/part-00000.parquet")
    (tmp_path / "pictures").symlink_to("other/scores")
    before = contents(tmp_path / "run"), contents(tmp_path / "other")
    for arguments in (
        ("select", "run", "-o", "run/manifest.json"),
        ("select", "run", "-o", "other/scores/part-00000.parquet"),
        ("select", "run", "-o", "link.jsonl"),
        ("select", "run", "-o", "other/embeddings/"),
        ("select", "run", "-o", "a.jsonl", "--rejected", "other/stdin.jsonl"),
        ("filter", "run.jsonl", "--run", "run", "-o", "run/data.jsonl"),
        ("filter", "run.jsonl", "--run", "new", "-o", "new/scores/a.jsonl"),
        ("compare", "run", "other", "--json", "other/manifest.json"),
        ("report", "run", "-o", "run/scores/a.html"),
        ("report", "run", "-o", "a.html", "--pictures", "pictures"),
    ):
        assert "would replace a part of the run" in command(*arguments).line()
    assert (contents(tmp_path / "run"), contents(tmp_path / "other")) == before
    assert not (tmp_path / "new").exists()
    command("select", "run", "-o", "run/kept.jsonl", "--keep", 1).done()
    assert (tmp_path / "run" / "kept.jsonl").read_text() == BEST


def test_standard_output_and_open_files_are_written_where_they_stand(run: Run, tmp_path: Path) -> None:
    assert shell(tmp_path, "$S -o /dev/stdout").stdout == BEST
    assert shell(tmp_path, "$S -o /dev/stdout | cat").stdout == BEST
    assert shell(tmp_path, "ln -s /dev/stdout l.csv; $S -o l.csv").stdout == "instruction,output\nq3,a3\n"
    (tmp_path / "log").write_text("before\n")
    inode = (tmp_path / "log").stat().st_ino
    assert (
        shell(tmp_path, "$S -o /dev/stdout >> log; $S -o /proc/self/fd/3 3>> log; $S -o /dev/fd/1 >> log").returncode
        == 0
    )
    assert (tmp_path / "log").read_text() == "before\n" + 3 * BEST
    assert (tmp_path / "log").stat().st_ino == inode
    refused = shell(tmp_path, "$S -o /dev/stdout >> run/manifest.json")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    ended = shell(tmp_path, "$S -o /dev/stdout >&-")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert run.complete


def test_pipes_and_devices_are_written_through(run: Run, tmp_path: Path) -> None:
    for name, show in (("p", "cat p"), ("p.parquet", "cat p.parquet > read.parquet")):
        os.mkfifo(tmp_path / name)
        done = shell(tmp_path, f"{show} & $S -o {name}; wait")
        assert done.returncode == 0
        assert is_stream(tmp_path / name)
        assert done.stdout == ("" if "." in name else BEST)
    assert pq.read_table(tmp_path / "read.parquet").to_pylist() == [ROWS[3]]
    (tmp_path / "null.jsonl").symlink_to("/dev/null")
    assert shell(tmp_path, "$S -o null.jsonl && $S -o /dev/null").returncode == 0
    assert (tmp_path / "null.jsonl").is_symlink()
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    full = shell(tmp_path, "$S -o /dev/full")
    assert (full.returncode, full.stderr) == (
        1,
        "scorer: /dev/full: the disk is full; free some space and run the same command again\n",
    )
    many = tmp_path / "many"
    make_run(many, [{**ROWS[0], "output": "x" * 10_000}] * 50, ifd=[0.5] * 50)
    early = shell(
        tmp_path, f"{CONSOLE_SCRIPT} select many --keep 100% -o /dev/stdout | head -c 1; echo ${{PIPESTATUS[0]}}"
    )
    assert (early.stdout, early.stderr) == ("{1\n", "")


def test_names_as_long_as_a_file_system_takes(run: Run, command: Commands, tmp_path: Path) -> None:
    for name in ("x" * 249 + ".jsonl", "é" * 124 + ".jsonl"):
        command("select", "run", "-o", name, "--keep", 1).done()
        assert (tmp_path / name).read_text() == BEST
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name in ("x" * 250 + ".jsonl", "loop.jsonl"):
        assert "can't be written" in command("filter", "run.jsonl", "-o", name, "--run", "new").line()
    assert not (tmp_path / "new").exists()


def test_sockets_are_refused_and_nothing_is_beside_a_pipe(run: Run, command: Commands, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jsonl"))
        assert "is a block device or a socket" in command("select", "run", "-o", "s.jsonl").line()
        with pytest.raises(ScorerError, match="socket"), replacing(tmp_path / "s.jsonl"):
            raise AssertionError("not reached")
    assert stat.S_ISSOCK((tmp_path / "s.jsonl").stat().st_mode)
    os.mkfifo(tmp_path / "p.jsonl")
    assert "name a directory with --run" in command("filter", "run.jsonl", "-o", "p.jsonl").line()
    line = command("select", "run", "-o", "p.jsonl", "--as", "messages", "--dataset-info").line()
    assert "a file beside the output" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("select", "run", "-o", ""),
        ("select", "", "-o", "a.jsonl"),
        ("select", "run", "-o", "a.jsonl", "--rejected", ""),
        ("select", "run", "-o", "a.jsonl", "--data", ""),
        ("score", "", "-o", "new"),
        ("score", "run.jsonl", "-o", ""),
        ("score", "run.jsonl", "-o", "new", "--model", ""),
        ("filter", "run.jsonl", "-o", ""),
        ("filter", "run.jsonl", "-o", "a.jsonl", "--run", ""),
        ("lp", "run.jsonl", "-o", ""),
        ("lp", "--runs", "run", "", "-o", "new"),
        ("cluster", ""),
        ("cluster", "run", "--embedder", ""),
        ("compare", "run", ""),
        ("compare", "run", "run", "--json", ""),
        ("report", "", "-o", "a.html"),
        ("report", "run", "-o", ""),
        ("report", "run", "-o", "a.html", "--pictures", ""),
        ("models", "fetch", ""),
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    run: Run, command: Commands, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    before = contents(run.path)
    assert "is empty" in command(*arguments).line()
    assert contents(run.path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("select", NOT_UTF8, "-o", "a.jsonl"),
        ("select", "run", "-o", f"{NOT_UTF8}.jsonl"),
        ("select", "run", "-o", f"{NOT_UTF8}/a.jsonl"),
        ("select", "run", "-o", "a.jsonl", "--rejected", f"{NOT_UTF8}.jsonl"),
        ("select", "run", "-o", "a.jsonl", "--data", f"{NOT_UTF8}.jsonl"),
        ("score", f"{NOT_UTF8}.jsonl", "-o", "new"),
        ("score", NOT_UTF8, "-o", "new"),
        ("score", "run.jsonl", "-o", NOT_UTF8),
        ("filter", "run.jsonl", "-o", "a.jsonl", "--run", NOT_UTF8),
        ("lp", "--runs", "run", f"{NOT_UTF8}.jsonl", "-o", "new"),
        ("compare", "run", NOT_UTF8),
        ("cluster", NOT_UTF8),
        ("report", "run", "-o", f"{NOT_UTF8}.html"),
    ],
)
def test_a_name_that_is_not_utf8_is_refused(run: Run, command: Commands, arguments: tuple[str, ...]) -> None:
    shutil.copytree(run.path, run.path.parent / NOT_UTF8)
    shutil.copy(run.path.with_suffix(".jsonl"), run.path.parent / f"{NOT_UTF8}.jsonl")
    line = command(*arguments).line()
    assert "not UTF-8" in line
    assert "n\\udcff" in line
