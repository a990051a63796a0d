"""Selecting where the data is not where it was scored, and where the run knows of none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

import scorer
from scorer.learning.join import join_runs
from scorer.runs.directory import Run
from scorer.types import ScorerError
from tests.lib.command import Commands, alpaca, read_jsonl
from tests.lib.runs import run_of

ROWS = alpaca(5)
IFD = [0.1, 0.9, 0.2, 0.8, 0.3]


def write(path: Path, first: int, last: int) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[first:last]))
    return path


@pytest.fixture
def away(tmp_path: Path) -> Run:
    """A run over two files, which were moved to `new` since."""
    files = [write(tmp_path / "a.jsonl", 0, 2), write(tmp_path / "b.jsonl", 2, 5)]
    run = run_of(tmp_path / "run", files, [2, 3], ifd=IFD)
    (tmp_path / "new").mkdir()
    for file in files:
        shutil.move(file, tmp_path / "new" / file.name)
    return run


def test_files_that_moved(away: Run, tmp_path: Path) -> None:
    command = Commands(tmp_path)
    assert "no such file" in command("select", "run", "-o", "best.jsonl", "--keep", 2).line()
    given = ("--data", "new/a.jsonl", "--data", "new/b.jsonl")
    said = command("select", "run", "-o", "best.jsonl", "--keep", 2, *given).done()
    assert read_jsonl(tmp_path / "best.jsonl") == [ROWS[1], ROWS[3]]
    assert "not checked" not in said


def test_files_that_are_not_those_that_were_scored(away: Run, tmp_path: Path) -> None:
    command, a, b = Commands(tmp_path), tmp_path / "new" / "a.jsonl", tmp_path / "new" / "b.jsonl"
    select = ("select", "run", "-o", "best.jsonl", "--keep", 2)
    assert "1 files where 2 were scored" in command(*select, "--data", a).line()
    line = command(*select, "--data", b, "--data", a).line()
    assert f"{b}: is not {tmp_path / 'a.jsonl'} that was scored (it has " in line
    a.write_text(a.read_text().replace("0", "9"))
    line = command(*select, "--data", a, "--data", b).line()
    assert f"{a}: is not" in line
    assert "of the same size, but with another content" in line
    assert "would be overwritten" in command("select", "run", "-o", a, "--data", a, "--data", b).line()
    assert not (tmp_path / "best.jsonl").exists()


def test_runs_of_tables(tmp_path: Path) -> None:
    for epoch, values in enumerate(([9.0, 9.0, 9.0], [8.0, 5.0, 3.0])):
        pl.DataFrame({"record_id": range(3), "ppl_conditioned": values}).write_csv(tmp_path / f"{epoch}.csv")
    join_runs([tmp_path / "0.csv", tmp_path / "1.csv"], tmp_path / "run")
    command, data = Commands(tmp_path), write(tmp_path / "d.jsonl", 0, 3)
    select = ("select", "run", "-o", "best.jsonl", "--keep", 1)
    assert "--data" in command(*select).line()
    said = command(*select, "--data", data).done()
    assert read_jsonl(tmp_path / "best.jsonl") == ROWS[:1]  # what was learned least
    assert "not checked: record ids are taken for row numbers" in said
    write(data, 0, 5)
    assert "holds 5 rows" in command(*select, "--data", data).line()
    pl.DataFrame({"record_id": [1, 2, 3], "ppl_conditioned": [9.0, 8.0, 7.0]}).write_csv(tmp_path / "0.csv")
    join_runs([tmp_path / "0.csv", tmp_path / "0.csv"], tmp_path / "other")
    line = command("select", "other", "-o", "best.jsonl", "--keep", 1, "--data", write(data, 0, 3)).line()
    assert "not row numbers, 0 to 2" in line


def test_tables_in_python(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [write(tmp_path / "d.jsonl", 0, 5)], [5], ifd=IFD)
    assert run.to_polars().equals(run.scores())
    selection = scorer.select(run, keep=3, order="rank")
    best = [ROWS[1], ROWS[3], ROWS[4]]
    assert list(selection.records()) == list(selection.records()) == best
    assert selection.to_polars().to_dicts() == best
    write(tmp_path / "d.jsonl", 0, 4)
    with pytest.raises(ScorerError, match="changed since it was scored"):
        list(selection.records())


def test_datasets_in_python(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    run = run_of(tmp_path / "run", [write(tmp_path / "d.jsonl", 0, 5)], [5], ifd=IFD)
    scores = run.to_dataset()
    assert (scores["record_id"][:], scores["ifd"][:]) == ([0, 1, 2, 3, 4], IFD)
    kept = scorer.select(run, keep=2).to_dataset()
    assert kept.to_list() == [ROWS[1], ROWS[3]]
