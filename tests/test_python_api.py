"""What a user of the library sees: signatures, types, data in memory, and runs at a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

import datasets
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import scorer
from scorer import keywords
from scorer.agreement.config import CompareConfig
from scorer.config import ClusterConfig, Part
from scorer.models.find import ModelFiles
from scorer.runs import progress
from scorer.runs.directory import Run
from tests.lib.command import alpaca, read_jsonl
from tests.lib.runs import make_run

SCORING = ("fresh", "strict", "cluster")
TAKEN: dict[str, tuple[Any, list[Any], set[str]]] = {  # the types of a function's options, their dataclasses, others
    "score": (keywords.ScoreKeywords, [Part, scorer.ScoreConfig], set()),
    "learn": (keywords.LearnKeywords, [Part, scorer.ScoreConfig], {"strict"}),
    "select": (keywords.SelectKeywords, [scorer.SelectConfig], set()),
    "filter": (keywords.FilterKeywords, [Part, scorer.ScoreConfig, scorer.SelectConfig], set(SCORING)),
    "cluster": (keywords.ClusterKeywords, [ClusterConfig], set()),
    "compare": (keywords.CompareKeywords, [CompareConfig], set()),
}


@pytest.mark.parametrize("name", TAKEN)
def test_signatures_and_types_are_those_of_the_dataclasses(name: str) -> None:
    function = getattr(scorer, name)
    types, configs, others = TAKEN[name]
    expected = {f.name: f for config in configs for f in fields(config)}
    if name == "learn":
        del expected["protocol"]
    parameters = inspect.signature(function).parameters
    for option, f in expected.items():
        assert parameters[option].default == f.default
        assert f"        {option}: " in function.__doc__
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    assert others <= parameters.keys()
    hints = get_type_hints(types)
    assert hints.keys() == expected.keys() | others
    for config in configs:
        for option, hint in get_type_hints(config).items():
            assert option not in hints or hints[option] == hint


def test_every_public_name_is_documented() -> None:
    for name in scorer.__all__:
        assert getattr(scorer, name).__doc__
    assert scorer.__version__ == version("ifd-scorer")


ROWS = [{"instruction": f"Say {row['output']}", "output": row["output"]} for row in alpaca(4)]


@pytest.fixture
def options(tiny: Callable[[str], ModelFiles]) -> dict[str, Any]:
    return {"model": str(tiny("gpt2").path), "device": "cpu", "dtype": "float32"}


def kinds() -> Iterator[tuple[str, Any]]:
    table = pa.Table.from_pylist(ROWS)
    yield "list", ROWS
    yield "generator", (row for row in ROWS)
    yield "pandas", pd.DataFrame(ROWS)
    yield "polars", pl.DataFrame(ROWS)
    yield "arrow", table
    yield "batches", pa.Table.from_batches([batch for row in range(4) for batch in table.slice(row, 1).to_batches()])
    yield "dataset", datasets.Dataset.from_list(ROWS)
    # rows that indices choose, in another order than the table underneath
    yield (
        "chosen",
        datasets.Dataset.from_list([{"instruction": "no", "output": "no"}, *ROWS[::-1]]).select([4, 3, 2, 1]),
    )


def test_data_in_memory_is_scored_resumed_and_selected_from_like_a_file(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = scorer.score(ROWS, "run", **options).scores()
    assert expected["status"].to_list() == ["ok"] * 4
    for name, data in kinds():
        run = scorer.score(data, **options)
        assert run.path.parent == Path("scorer-runs")
        assert run.scores().equals(expected), name
        assert list(scorer.select(run, keep="100%", max_ifd=None).records()) == ROWS
    paths = {name: scorer.score(data, **options).path for name, data in kinds()}
    assert paths["arrow"] == paths["batches"]  # however it is in batches
    assert paths["list"] == paths["generator"]
    assert not list(Path("scorer-runs").glob(".*"))
    # the run directory keeps a copy, which binds the run
    assert scorer.score(ROWS, "run", **options).scores().equals(expected)
    with pytest.raises(scorer.ScorerError, match="run holds a run of other data"):
        scorer.score(ROWS[:3], "run", **options)
    assert read_jsonl(Path("run/data.jsonl")) == ROWS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no data"),
        (iter(()), "there are no records"),
        ([1], "row 0 is a int and not a dict"),
        ([{"a": float("nan")}], "row 0 can't be JSON"),
        ([{"instruction": "a", "output": object()}], "row 0 can't be JSON"),
        ([{"a": 1}, {1: 2, "1": 3}], "row 1 can't be JSON .the key 1 is no text"),
        ([[{"role": "user", "content": [{None: "a"}]}]], "row 0 can't be JSON .the key None is no text"),
        ({"instruction": "a"}, "dict is no rows"),
        (7, "int is no rows"),
        (None, "NoneType is no rows"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "choose one of its splits: train"),
        (pd.DataFrame({"instruction": ["a", 1], "output": ["b", "c"]}), "can't be written as Arrow"),
        (pl.DataFrame({"instruction": [], "output": []}), "there are no records"),
    ],
)
def test_data_that_is_none(data: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(scorer.ScorerError, match=message):
        scorer.score(data)


def test_filter_is_score_and_select(options: dict[str, Any], tmp_path: Path) -> None:
    found = scorer.filter(ROWS, tmp_path / "best.jsonl", keep=2, max_ifd=None, **options)
    assert found.kept.height == 2
    run = Run(tmp_path / "best.jsonl.run")
    assert scorer.select(run, keep=2, max_ifd=None).kept.equals(found.kept)
    assert all(row in ROWS for row in read_jsonl(tmp_path / "best.jsonl"))
    for call, data in product((scorer.score, scorer.filter), (ROWS, run.data)):
        with pytest.raises(scorer.ScorerError, match="data in memory has no parts"):
            call(data, tmp_path / "part.jsonl", split="train", **options)
    with pytest.raises(scorer.ScorerError, match=r"no record of .* has a value of 'topic'"):
        scorer.filter(ROWS, tmp_path / "best.jsonl", keep=2, per="topic", **options)


def test_a_run_shows_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<run>", ROWS, ifd=[0.1, 0.2, 0.3, None], status=["ok"] * 3 + ["bad_json"])
    assert repr(run).splitlines() == [
        f"Run('{tmp_path}/<run>'): 4 records, complete",
        "status: 3 ok, 1 bad_json",
    ]
    run = make_run(tmp_path / "two", ROWS, ifd=[0.1, 0.2, 0.3, 0.4], response_tokens=[1, 2, 3, 4])
    assert repr(run).splitlines()[2] == "ifd: 0% 0.1, 10% 0.13, 50% 0.25, 90% 0.37, 100% 0.4"
    assert "<pre>Run(&#x27;" in run._repr_html_()
    assert repr(Run(tmp_path / "none")) == f"Run('{tmp_path}/none')"
    (tmp_path / "two" / "manifest.json").write_text("{")
    assert repr(Run(tmp_path / "two")) == f"Run('{tmp_path}/two')"
    public = {name for name in dir(Run) if not name.startswith("_")}
    assert not {name for name in public if name.startswith(("write", "clear", "remove", "lock"))}


def test_progress_is_shown_where_someone_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        monkeypatch.setattr(progress.console, "_force_terminal", terminal)
        with progress.shown(None) as receiver:
            assert isinstance(receiver, progress.ConsoleProgress) == terminal
    mine = progress.Silent()
    with progress.shown(mine) as receiver:
        assert receiver is mine
    with progress.shown(False) as receiver:
        assert isinstance(receiver, progress.Silent)
