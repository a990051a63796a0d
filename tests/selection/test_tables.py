"""Selections of tables whose columns are of less common types: every value is written, or the selection refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import scorer
from scorer.data.dataset import Dataset
from scorer.files.memory import write as write_memory
from scorer.runs.directory import Run
from scorer.types import ScorerError
from tests.lib.runs import run_of

IFD = [0.8, 0.1, 0.9]  # the best two are row 2, then row 0
LONG = "so it goes, " * 3  # a text that a view does not hold in itself
FRAME = pl.DataFrame(
    {
        "instruction": pl.Series(["q0", "q1", "q2"], dtype=pl.Categorical),
        "output": [f"{LONG}{i}" for i in range(3)],
        "kind": pl.Series(["a", None, "b"], dtype=pl.Enum(["a", "b"])),
        "tags": [["x", LONG], None, []],
        "turn": [{"who": "me", "said": [LONG]}, {"who": None, "said": None}, {"who": "you", "said": []}],
        "kinds": pl.Series([["k"], [], [None]], dtype=pl.List(pl.Categorical)),
    }
)
WITH_BYTES = FRAME.with_columns(raw=pl.Series([b"\x00", LONG.encode(), None]))


def in_memory(frame: pl.DataFrame, path: Path) -> None:
    with path.open("wb") as file:
        write_memory(frame, file)


FORMATS: dict[str, tuple[str, Callable[[pl.DataFrame, Path], Any]]] = {
    "memory": ("d.arrow", in_memory),
    "ipc": ("d.ipc", pl.DataFrame.write_ipc),
    "parquet": ("d.parquet", pl.DataFrame.write_parquet),
}


def one_run(folder: Path, *tables: pa.Table) -> Run:
    """A run of a file for each table, of one row."""
    paths = [folder / f"{i}.arrow" for i in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    return run_of(folder / "run", paths, [1] * len(tables), ifd=[0.5] * len(tables))


@pytest.mark.parametrize("form", FORMATS)
def test_polars_frames(tmp_path: Path, form: str) -> None:
    name, write = FORMATS[form]
    write(WITH_BYTES, tmp_path / name)
    write(FRAME, tmp_path / f"text-{name}")
    run = run_of(tmp_path / "run", [tmp_path / name], [3], ifd=IFD)
    best = WITH_BYTES[[2, 0]]
    selection = scorer.select(run, tmp_path / "a.parquet", keep=2, order="rank", with_scores=True)
    assert pl.read_parquet(tmp_path / "a.parquet").drop("scorer").to_dicts() == best.to_dicts()
    assert selection.to_polars().equals(best)
    scorer.select(run, tmp_path / "a.arrow", keep=2, order="rank")
    assert pl.read_ipc(tmp_path / "a.arrow").equals(best)
    assert [raw.value["instruction"] for raw in Dataset([tmp_path / name]).rows()] == ["q0", "q1", "q2"]
    run = run_of(tmp_path / "text", [tmp_path / f"text-{name}"], [3], ifd=IFD)
    scorer.select(run, tmp_path / "a.jsonl", keep=2, order="rank")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == FRAME[[2, 0]].to_dicts()


def test_polars_frames_as_csv_and_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    FRAME.select("instruction", "output", "kind").write_ipc(tmp_path / "d.arrow")
    run = run_of(tmp_path / "run", [tmp_path / "d.arrow"], [3], ifd=IFD)
    selection = scorer.select(run, tmp_path / "a.csv", keep=2, order="rank")
    assert (tmp_path / "a.csv").read_text() == f'instruction,output,kind\nq2,"{LONG}2",b\nq0,"{LONG}0",a\n'
    assert selection.to_dataset().shuffle(seed=0)["instruction"][:] in (["q2", "q0"], ["q0", "q2"])
    scorer.select(run, f"{tmp_path}/folder/", keep=2, with_scores=True)


def test_a_selection_of_views_holds_no_other_rows(tmp_path: Path) -> None:
    texts = pa.array([LONG, "secret " * 10], pa.string_view())
    table = pa.table({"instruction": texts, "output": texts})
    pq.write_table(table, tmp_path / "d.parquet")
    run = run_of(tmp_path / "run", [tmp_path / "d.parquet"], [2], ifd=[0.9, 0.1])
    scorer.select(run, tmp_path / "a.arrow", keep=1)
    with pa.ipc.open_file(tmp_path / "a.arrow") as file:
        assert file.read_all().equals(table.slice(0, 1))
    assert b"secret" not in (tmp_path / "a.arrow").read_bytes()


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.dictionary(pa.uint32(), pa.string_view())])
def test_runs_are_their_values(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["x", "y", None]).cast(pa.string_view() if kind == pa.string_view() else pa.string())
    if pa.types.is_dictionary(kind):
        values = values.dictionary_encode().cast(kind)
    column = pa.RunEndEncodedArray.from_arrays([2, 4, 5], values).slice(1)
    table = pa.table({"instruction": column, "output": [LONG] * 4})
    with pa.ipc.new_file(tmp_path / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    assert [raw.value["instruction"] for raw in Dataset([tmp_path / "d.arrow"]).rows()] == ["x", "y", "y", None]
    run = run_of(tmp_path / "run", [tmp_path / "d.arrow"], [4], ifd=[0.5, 0.1, 0.7, 0.9])
    for name in ("a.parquet", "a.jsonl"):
        scorer.select(run, tmp_path / name, keep=3, order="rank")
        rows = [raw.value for raw in Dataset([tmp_path / name]).rows()]
        assert [row["instruction"] for row in rows] == [None, "y", "x"]


MONEY_MAP = pa.map_(pa.string(), pa.decimal128(5, 1))
MONEY = pa.array([Decimal("12345678901234567890.25")])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (MONEY, pa.array([0.5])),
        (pa.array([0.5], pa.float32()), MONEY),
        (pa.array(["abc"]), pa.array([b"abc"])),
        (pa.array([b"ab"], pa.binary(2)), pa.array(["abc"], pa.string_view())),
        (pa.array([[{"a": "abc"}]]), pa.array([[{"a": b"abc", "b": 1}]])),
        (pa.array([[("k", 0.5)]], pa.map_(pa.string(), pa.float64())), pa.array([[("k", 1)]], MONEY_MAP)),
    ],
)
def test_files_whose_types_have_none_in_common_that_keeps_values(
    tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    run = one_run(tmp_path, *(pa.table({"instruction": ["a"], "output": ["b"], "x": x}) for x in (one, other)))
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(ScorerError, match=r"different columns; write to JSON Lines.*x"):
            scorer.select(run, tmp_path / name, keep=2)
        assert not (tmp_path / name).exists()


def test_files_whose_types_have_one_in_common(tmp_path: Path) -> None:
    columns = [
        {"instruction": pa.array(["a"]), "n": pa.array([-1], pa.int8()), "m": MONEY},
        {"instruction": pa.array(["b"], pa.string_view()), "n": pa.array([2**40]), "m": pa.array([7])},
        {"instruction": pa.array(["c"], pa.large_string()), "n": pa.nulls(1), "m": pa.nulls(1)},
    ]
    run = one_run(tmp_path, *(pa.table({"output": ["b"], **column}) for column in columns))
    scorer.select(run, tmp_path / "a.arrow", keep=3)
    with pa.ipc.open_file(tmp_path / "a.arrow") as file:
        written = file.read_all().to_pydict()
    assert written["instruction"] == ["a", "b", "c"]
    assert written["n"] == [-1, 2**40, None]
    assert written["m"] == [MONEY[0].as_py(), Decimal(7), None]


def test_enums_of_two_files(tmp_path: Path) -> None:
    for name, values in (("a", ["x"]), ("b", ["y", "x"])):
        kind = pl.Series([values[0]], dtype=pl.Enum(values))
        pl.DataFrame({"output": ["o"], "kind": kind, "kinds": kind.reshape((1, 1)).arr.to_list()}).write_ipc(
            tmp_path / f"{name}.arrow"
        )
    run = run_of(tmp_path / "run", [tmp_path / "a.arrow", tmp_path / "b.arrow"], [1, 1], ifd=[0.5, 0.6])
    selection = scorer.select(run, tmp_path / "c.parquet", keep=2)
    assert pl.read_parquet(tmp_path / "c.parquet")["kind"].to_list() == ["x", "y"]
    assert selection.to_polars()["kind"].to_list() == ["x", "y"]
    assert selection.to_polars()["kinds"].to_list() == [["x"], ["y"]]


@pytest.mark.parametrize("header", [",instruction,output", ",instruction,column_0", 'instruction,"a\rb",'])
def test_columns_without_a_name_keep_none(tmp_path: Path, header: str) -> None:
    (tmp_path / "d.csv").write_text(f"{header}\n0,say it,blue is one\n", newline="")
    run = run_of(tmp_path / "run", [tmp_path / "d.csv"], [1], ifd=[0.5])
    [came] = [raw.value for raw in Dataset([tmp_path / "d.csv"]).rows()]
    for name in ("a.csv", "a.tsv", "a.parquet", "a.jsonl"):
        scorer.select(run, tmp_path / name, keep=1)
        assert [raw.value for raw in Dataset([tmp_path / name]).rows()] == [came]
    assert scorer.select(run, keep=1).to_polars().to_dicts() == [came]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_rows_of_one_cell_are_no_blank_lines(tmp_path: Path, name: str) -> None:
    for column, values in (("output", ["a", None, ""]), ("", [None, 1, 2])):
        (tmp_path / "d.jsonl").write_text("".join(json.dumps({column: value}) + "\n" for value in values))
        run = run_of(tmp_path / f"run-{column}", [tmp_path / "d.jsonl"], [3], ifd=IFD)
        scorer.select(run, tmp_path / name, keep=3)
        written = [raw.value for raw in Dataset([tmp_path / name]).rows()]
        assert written == [{column: "" if value is None else str(value)} for value in values]


LARGE = ("1e400", "-1e400", "[1E+0400]", f"{'9' * 250}e60", f"{'9' * 310}.5", f"{'9' * 400}")


@pytest.mark.parametrize("number", LARGE, ids=lambda text: text[:10])
def test_numbers_that_no_float_holds(tmp_path: Path, number: str) -> None:
    line = f'{{"instruction":"1e400","output":"b","x":{number}}}'
    (tmp_path / "d.jsonl").write_text(line)
    run = run_of(tmp_path / "run", [tmp_path / "d.jsonl"], [1], ifd=[0.5])
    for name in ("a.parquet", "a.arrow", "a.csv"):
        with pytest.raises(ScorerError, match=r"JSON Lines"):
            scorer.select(run, tmp_path / name, keep=1)
    scorer.select(run, tmp_path / "a.jsonl", keep=1)
    assert (tmp_path / "a.jsonl").read_text() == f"{line}\n"
    selection = scorer.select(run, tmp_path / "a.jsonl", keep=1, form="messages")
    assert selection.rejected["reason"].to_list() == ["not_convertible"]


def test_infinities_and_numbers_in_texts_are_kept_in_tables(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"output":"1e400","x":Infinity}\n{"output":"b","x":1e300}\n')
    run = run_of(tmp_path / "run", [tmp_path / "d.jsonl"], [2], ifd=[0.5, 0.5])
    scorer.select(run, tmp_path / "a.parquet", keep=2)
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert rows == [{"output": "1e400", "x": float("inf")}, {"output": "b", "x": 1e300}]
