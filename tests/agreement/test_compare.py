"""`scorer compare` in real processes: runs, tables and selected files, and what can't be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scorer.agreement.compare import compare
from scorer.runs.directory import Run
from tests.lib.command import Commands
from tests.lib.runs import edit_manifest, make_run, write_clusters

ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(8)]
FIRST = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
SECOND = [0.8, 0.7, 0.3, 0.2, 0.6, 0.5, 0.1, None]  # of the seven of both: 17 pairs agree, 4 do not


@pytest.fixture
def command(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    make_run(tmp_path / "one", ROWS, ifd=FIRST, lp1=[1 - v for v in FIRST])
    status = ["ok"] * 7 + ["oom"]
    make_run(tmp_path / "two", ROWS, ifd=SECOND, status=status)
    return tmp_path / "one", tmp_path / "two"


def figures(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def test_two_runs(command: Commands, runs: tuple[Path, Path], tmp_path: Path) -> None:
    shown = command("compare", "one", "two", "--at", "30%,60%", "--json", "a.json").shown()
    assert "one by ifd (highest), two by ifd (highest): 7 records" in shown
    assert "1 more have no finite value from both" in shown
    assert re.search(r"Kendall tau-b +0\.619 ", shown)
    assert "per cluster" not in shown
    (row,) = figures(tmp_path / "a.json")
    agreement = row["agreement"]
    assert agreement["kendall"]["value"] == pytest.approx(13 / 21)
    # 2 of 7: {0 1} both; 4 of 7: {0 1 2 3} and {0 1 4 5}
    assert [(cut["share"], cut["records"], cut["shared"]) for cut in agreement["whole"]] == [(0.3, 2, 2), (0.6, 4, 2)]
    assert agreement["whole"][1]["iou"]["value"] == pytest.approx(1 / 3)
    command("compare", "one", "two", "--at", "30%,60%", "--json", "b.json").done()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_per_cluster_of_the_first_run(command: Commands, runs: tuple[Path, Path], tmp_path: Path) -> None:
    write_clusters(Run(runs[0]), {"record_id": range(7), "cluster": [5, 5, 5, 5, 2, 2, 2]})
    shown = command("compare", "one", "two", "--at", "50%", "--json", "a.json").shown()
    # 4 of 7, quotas 2 and 2: {0 1} both; {4 5} both
    assert "best 50% per cluster, 4: overlap" in shown
    assert figures(tmp_path / "a.json")[0]["agreement"]["per_cluster"][0]["shared"] == 4
    command("compare", "two", "one", "--at", "50%", "--json", "a.json").done()
    assert figures(tmp_path / "a.json")[0]["agreement"]["per_cluster"] is None


def test_columns_and_ends(command: Commands, runs: tuple[Path, Path], tmp_path: Path) -> None:
    shown = command("compare", "one", "one", "--by", "ifd,lp1", "--at", "50%", "--json", "a.json").shown()
    assert "one by ifd (highest), one by lp1 (lowest)" in shown
    (row,) = figures(tmp_path / "a.json")
    assert row["agreement"]["kendall"]["value"] == pytest.approx(-1)
    assert row["agreement"]["whole"][0]["shared"] == 4
    command("compare", "one", "one", "--by", "ifd,lp1", "--at", "50%", "--highest", "--json", "a.json").done()
    assert figures(tmp_path / "a.json")[0]["agreement"]["whole"][0]["shared"] == 0
    shown = command("compare", "one", "two", "--by", "ifd", "--lowest", "--at", "30%").shown()
    assert "one by ifd (lowest), two by ifd (lowest)" in shown
    assert "there is no column of numbers 'luck'; --by takes one of" in command("compare", *runs, "--by", "luck").line()
    assert "one for each of the 2" in command("compare", *runs, "--by", "ifd,ifd,lp1").line()


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".json"])
def test_tables(runs: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
    table = pl.DataFrame({"record_id": range(8), "ifd": SECOND}).reverse()  # joined by id, in any order
    path = tmp_path / f"table{suffix}"
    writers: dict[str, Callable[[Path], object]]
    writers = {".csv": table.write_csv, ".parquet": table.write_parquet, ".jsonl": table.write_ndjson}
    writers.get(suffix, table.write_json)(path)
    of_runs, of_table = (compare([runs[0], other], at="60%")[0] for other in (runs[1], path))
    assert of_table.agreement == of_runs.agreement  # type: ignore[union-attr]


def test_three_are_compared_two_by_two(runs: tuple[Path, Path], tmp_path: Path) -> None:
    names = [(row.first, row.second) for row in compare([*runs, runs[0]], resamples=2)]
    one, two = map(str, runs)
    assert names == [(one, two), (one, one), (two, one)]


def test_other_ids_are_an_error_with_counts(command: Commands, runs: tuple[Path, Path], tmp_path: Path) -> None:
    pl.DataFrame({"record_id": [0, 1, 2, 9], "ifd": [0.1] * 4}).write_csv(tmp_path / "t.csv")
    line = command("compare", "one", "t.csv").line()
    assert "5 of the 8 rows of one are not in it, and 1 of its own" in line
    pl.DataFrame({"record_id": [0, 0, 1], "ifd": [0.1] * 3}).write_csv(tmp_path / "t.csv")
    assert "1 rows repeat" in command("compare", "one", "t.csv").line()
    pl.DataFrame({"record_id": [0, None], "ifd": [0.1] * 2}).write_csv(tmp_path / "t.csv")
    assert "1 rows have no record_id" in command("compare", "one", "t.csv").line()
    pl.DataFrame({"id": [0], "ifd": [0.1]}).write_csv(tmp_path / "t.csv")
    assert "no column record_id" in command("compare", "one", "t.csv").line()
    pl.DataFrame({"record_id": [0], "a": [0.1], "b": [0.2]}).write_csv(tmp_path / "t.csv")
    assert "which column is meant? --by takes one of a, b" in command("compare", "t.csv", "t.csv").line()


def test_selected_files_by_content(command: Commands, tmp_path: Path) -> None:
    one = [*ROWS[:4], ROWS[0]]
    two = [{**dict(reversed(row.items())), "scorer": {"rank": 1}} for row in (ROWS[0], ROWS[0], ROWS[3], ROWS[7])]
    (tmp_path / "a.json").write_text(json.dumps(one))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, two)))
    shown = command("compare", "a.json", "b.jsonl", "--json", "c.json").shown()
    assert "a.json (5 records), b.jsonl (4 records)" in shown
    assert "3 in both; intersection over union 0.500" in shown  # 0, 0, 3 of 0 0 1 2 3 7
    (row,) = figures(tmp_path / "c.json")
    assert row == {"first": "a.json", "second": "b.jsonl", "records": [5, 4], "shared": 3, "iou": 0.5}
    assert "by content" in command("compare", "a.json", "b.jsonl", "--by", "ifd").line()


def test_what_is_refused(command: Commands, runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert "name two or more" in command("compare", "one").line()
    assert "a number of records; give shares" in command("compare", *runs, "--at", "5").line()
    assert "at: 'x'" in command("compare", *runs, "--at", "5%,x").line()
    assert "has no record_id" in command("compare", "one", "one.jsonl").line()
    assert "no such file" in command("compare", "one", "nowhere.json").line()
    assert "not a run directory" in command("compare", "one", tmp_path).line()
    for taken in ("one.jsonl", "two.jsonl"):
        assert "would be overwritten" in command("compare", "one", "two", "--json", taken).line()
    edit_manifest(runs[1], state="running")
    assert "unfinished" in command("compare", *runs).line()
    assert "can't be written" in command("compare", "one", "one", "--json", "/proc/a.json").line()
