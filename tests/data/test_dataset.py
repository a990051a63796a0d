"""Several inputs as one: how often their files are opened and hashed, and what is kept between two readings."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import scorer
from scorer.data import dataset as module
from scorer.data.dataset import Dataset
from scorer.files.writer import RecordWriter
from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from scorer.types import ScorerError
from tests.lib.runs import edit_manifest

ROWS = [{"instruction": f"Say {i}.", "output": f"It is {i} and more.", "language": "de"} for i in range(12)]
OPENED: Counter[str] = Counter()
sys.addaudithook(lambda event, given: OPENED.update([str(given[0])]) if event == "open" else None)


@pytest.fixture
def opened() -> Counter[str]:
    """How often Python has opened each path since the test began."""
    OPENED.clear()
    return OPENED


def inputs(folder: Path) -> list[Path]:
    """Twelve rows in four files. (Parquet is opened by Polars, which no audit hook sees.)"""
    paths = [folder / name for name in ("a.jsonl", "b.json", "c.json.gz", "d.jsonl.zst")]
    for number, path in enumerate(paths):
        with RecordWriter(path) as writer:
            for row in ROWS[number * 3 : number * 3 + 3]:
                writer.write(row)
    return paths


def test_score_and_select_open_each_input_once(
    tiny: Callable[[str], ModelFiles], tmp_path: Path, opened: Counter[str]
) -> None:
    paths = inputs(tmp_path)
    options: dict[str, Any] = {"model": str(tiny("gpt2").path), "device": "cpu", "dtype": "float32"}
    opened.clear()
    run = scorer.score(paths, tmp_path / "run", shard_rows=2, **options)
    assert [opened[str(path)] for path in paths] == [1, 1, 1, 1]
    assert run.scores()["record_id"].to_list() == list(range(12))

    opened.clear()
    selected = scorer.select(
        run.path, tmp_path / "kept.json", rejected=tmp_path / "rest.json", keep=5, per="language", max_ifd=None
    )
    files = 2  # that are written: each takes the texts of an array's elements anew
    assert all(opened[str(path)] <= 1 + files for path in paths)
    assert opened[str(paths[0])] == 1
    assert selected.kept.height == 5

    opened.clear()  # a complete run is found to be so without a look at the data
    scorer.score(paths, tmp_path / "run", shard_rows=2, **options)
    assert not any(opened[str(path)] for path in paths)


def test_a_file_with_another_time_is_hashed_again(tmp_path: Path, opened: Counter[str]) -> None:
    path = inputs(tmp_path)[0]
    with Dataset([path]) as data:
        data.inspect()
        opened.clear()
        data.check_unchanged()
        assert opened[str(path)] == 0
        os.utime(path, (1, 1))
        data.check_unchanged()
        assert opened[str(path)] == 1
        path.write_bytes(path.read_bytes().replace(b"Say 1", b"Say 7"))
        with pytest.raises(ScorerError, match="changed since it was scored"):
            data.check_unchanged()


def test_a_manifest_without_times_is_checked_by_hashes(
    tiny: Callable[[str], ModelFiles], tmp_path: Path, opened: Counter[str]
) -> None:
    path = inputs(tmp_path)[0]
    scorer.score(path, tmp_path / "run", model=str(tiny("gpt2").path), device="cpu", dtype="float32")
    known = Run(tmp_path / "run").manifest.inputs[0]
    edit_manifest(tmp_path / "run", inputs=(replace(known, modified_ns=None),))
    opened.clear()
    assert scorer.select(tmp_path / "run", tmp_path / "kept.jsonl", keep=2).kept.height == 2
    assert opened[str(path)] == 2


def test_arrays_beyond_what_is_kept_are_parsed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_ARRAY_BYTES", 200)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        with RecordWriter(path) as writer:
            writer.write(ROWS[0])
            writer.write(ROWS[1])
    assert paths[0].stat().st_size < 200 < 2 * paths[0].stat().st_size
    with Dataset(paths) as data:
        data.inspect()
        paths[1].write_bytes(paths[1].read_bytes().replace(b"Say 0", b"Say 7"))
        assert [raw.value["instruction"] for raw in data.rows()] == ["Say 0.", "Say 1.", "Say 7.", "Say 1."]


def test_more_files_than_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    paths = inputs(tmp_path)
    with Dataset(paths, limit=10) as data:
        data.inspect()
        assert data.counts == (3, 3, 3, 3)
        assert [raw.value for raw in data.rows()] == ROWS[:10]
        assert [raw.record_id for raw in data.rows(4, 8)] == [4, 5, 6, 7]
