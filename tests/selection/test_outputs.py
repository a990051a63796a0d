"""The kinds of files that a selection is written to, and that its values stay what they were."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import scorer
from scorer.runs.directory import Run
from scorer.types import ScorerError
from tests.lib.runs import make_run, run_of

IFD = [0.1, 0.9, 0.2, 0.8, 0.3]  # the best two are rows 1 and 3
BEST = [1, 3]
COLUMNS: dict[str, pa.Array] = {
    "instruction": pa.array([f"q{i}" for i in range(5)]),
    "output": pa.array([f"so it goes {i}" for i in range(5)]),
    "u64": pa.array([1, 2**64 - 1, 3, 2**63, None], pa.uint64()),
    "i8": pa.array([1, -128, 3, None, 5], pa.int8()),
    "f32": pa.array([0.1, 0.2, 0.3, float("nan"), None], pa.float32()),
    "ns": pa.array([1, 1_700_000_000_000_000_001, 3, None, 5], pa.timestamp("ns", "UTC")),
    "day": pa.array([1, 10_000_000, 3, None, 5], pa.date32()),
    "time": pa.array([1, 2, 3, 4, None], pa.time64("ns")),
    "money": pa.array([Decimal("1.10"), Decimal("12345678901234567890.50"), None, Decimal("0.00"), None]),
    "kind": pa.array(["a", "b", "a", None, "b"]).dictionary_encode(),
    "bytes": pa.array([b"", b"\x00\xff", None, b"x", b""]),
    "nested": pa.array([None, {"a": None, "b": [1, None]}, {"a": "x", "b": None}, {"a": "y", "b": []}, None]),
}
METADATA = {"huggingface": json.dumps({"info": {"features": {}}}), "pandas": json.dumps({"columns": []})}
TABLE = pa.table(COLUMNS).replace_schema_metadata(METADATA)
FLAT: list[dict[str, Any]] = [
    {"instruction": f"q{i}", "output": f'say, "{i}"', "n": 2**53 + i, "f": i + 0.1, "t": "" if i % 2 else None}
    for i in range(5)
]


@pytest.fixture
def table_run(tmp_path: Path) -> Run:
    """A run over the rows of TABLE, in row groups of two."""
    pq.write_table(TABLE, tmp_path / "data.parquet", row_group_size=2)
    return run_of(tmp_path / "run", [tmp_path / "data.parquet"], [5], ifd=IFD)


def parquet(path: Path) -> pa.Table:
    return pq.read_table(path)


def bits(table: pa.Table) -> pa.Table:
    """The table with f32 as the integers of its bits, since NaN equals nothing."""
    chunks = [chunk.view(pa.int32()) for chunk in table["f32"].chunks]
    return table.set_column(table.column_names.index("f32"), "f32", pa.chunked_array(chunks, pa.int32()))


def test_parquet_to_parquet_keeps_types_and_metadata(table_run: Run, tmp_path: Path) -> None:
    scorer.select(table_run, tmp_path / "a.parquet", keep=2)
    came, written = parquet(tmp_path / "data.parquet"), parquet(tmp_path / "a.parquet")
    assert written.schema.equals(came.schema, check_metadata=True)
    assert bits(written).equals(bits(came.take(BEST)))
    assert written["u64"].to_pylist() == [2**64 - 1, 2**63]
    assert pq.read_metadata(tmp_path / "a.parquet").metadata[b"huggingface"] == METADATA["huggingface"].encode()
    scorer.select(table_run, tmp_path / "b.parquet", keep=3, order="rank", rejected=tmp_path / "c.parquet")
    assert bits(parquet(tmp_path / "b.parquet")).equals(bits(came.take([1, 3, 4])))
    rejected = parquet(tmp_path / "c.parquet")
    assert bits(rejected.drop_columns("scorer")).equals(bits(came.take([0, 2])))
    assert rejected["scorer"].to_pylist() == [{"record_id": i, "reason": "below_cut"} for i in (0, 2)]


def test_scores_are_one_more_column(table_run: Run, tmp_path: Path) -> None:
    scorer.select(table_run, tmp_path / "a.parquet", keep=2, with_scores=True)
    written = parquet(tmp_path / "a.parquet")
    assert bits(written.drop_columns("scorer")).equals(bits(parquet(tmp_path / "data.parquet").take(BEST)))
    assert [(row["record_id"], row["rank"], row["ifd"]) for row in written["scorer"].to_pylist()] == [
        (1, 1, 0.9),
        (3, 2, 0.8),
    ]
    again = run_of(tmp_path / "again", [tmp_path / "a.parquet"], [2], ifd=[0.5, 0.6])
    with pytest.raises(ScorerError, match="'scorer' already"):
        scorer.select(again, tmp_path / "b.parquet", keep=1, with_scores=True)


def test_arrow_files_and_folders(table_run: Run, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    scorer.select(table_run, tmp_path / "a.arrow", keep=2)
    with pa.ipc.open_file(tmp_path / "a.arrow") as file:
        assert bits(file.read_all()).equals(bits(parquet(tmp_path / "data.parquet").take(BEST)))
    scorer.select(table_run, f"{tmp_path}/best/", keep=2)
    assert datasets.load_from_disk(str(tmp_path / "best"))["u64"][:] == [2**64 - 1, 2**63]
    with pytest.raises(ScorerError, match="is there already"):
        scorer.select(table_run, f"{tmp_path}/best/", keep=2)
    assert not list(tmp_path.glob(".*"))


def test_no_rows_keep_their_columns(table_run: Run, tmp_path: Path) -> None:
    scorer.select(table_run, tmp_path / "a.parquet", keep=2, max_ifd=0.05)
    assert parquet(tmp_path / "a.parquet").equals(parquet(tmp_path / "data.parquet").slice(0, 0))


def test_parquet_to_json_keeps_every_digit(table_run: Run, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(ScorerError, match=r"'(bytes' holds binary|nested' holds lists)"):
            scorer.select(table_run, tmp_path / name, keep=2)
    pq.write_table(TABLE.drop_columns("bytes"), tmp_path / "text.parquet")
    run = run_of(tmp_path / "text", [tmp_path / "text.parquet"], [5], ifd=IFD)
    scorer.select(run, tmp_path / "a.jsonl", keep=1)
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {
        "instruction": "q1",
        "output": "so it goes 1",
        "u64": 2**64 - 1,
        "i8": -128,
        "f32": 0.20000000298023224,  # what a float of 32 bits is
        "ns": "2023-11-14 22:13:20.000000001Z",
        "day": "29349-01-26",
        "time": "00:00:00.000000002",
        "money": "12345678901234567890.50",
        "kind": "b",
        "nested": {"a": None, "b": [1, None]},
    }
    scorer.select(run, tmp_path / "b.json", keep=1, with_scores=True)
    [row] = json.loads((tmp_path / "b.json").read_text())
    assert (row["u64"], row["scorer"]["ifd"]) == (2**64 - 1, 0.9)
    with pytest.raises(ScorerError, match=r"text.parquet\[3\] .*NaN"):
        scorer.select(run, tmp_path / "a.jsonl", keep=2)


def test_json_to_parquet_keeps_integers_and_nulls(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": "a", "n": 2**63 - 1 - i, "x": {"a": None if i else [1]}} for i in range(5)]
    run = make_run(tmp_path / "run", rows, ifd=IFD)
    scorer.select(run, tmp_path / "a.parquet", keep=2)
    assert parquet(tmp_path / "a.parquet").to_pylist() == [rows[i] for i in BEST]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_flat_records_to_csv(tmp_path: Path, name: str, separator: str) -> None:
    run = make_run(tmp_path / "run", FLAT, ifd=IFD)
    scorer.select(run, tmp_path / name, keep=4)
    assert (tmp_path / name).read_text().replace("\t", ",") == (  # null is nothing, and an empty text ""
        "instruction,output,n,f,t\n"
        'q1,"say, ""1""",9007199254740993,1.1,""\n'
        'q2,"say, ""2""",9007199254740994,2.1,\n'
        'q3,"say, ""3""",9007199254740995,3.1,""\n'
        'q4,"say, ""4""",9007199254740996,4.1,\n'
    )
    scorer.select(run, tmp_path / name, keep=1, with_scores=True)
    scores = pl.read_csv(tmp_path / name, separator=separator)
    assert scores.select("instruction", "scorer.rank", "scorer.ifd").rows() == [("q1", 1, 0.9)]
    nested = make_run(tmp_path / "nested", [{**row, "tags": [1]} for row in FLAT], ifd=IFD)
    with pytest.raises(ScorerError, match="'tags' holds lists"):
        scorer.select(nested, tmp_path / name, keep=1)


def test_files_of_two_kinds_in_one(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": pa.array([0, 1], pa.int8()), "output": ["a", "b"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"n": 2**40 + i, "day": "x"}) + "\n" for i in range(3)))
    run = run_of(tmp_path / "run", [tmp_path / "a.parquet", tmp_path / "b.jsonl"], [2, 3], ifd=IFD)
    scorer.select(run, tmp_path / "c.parquet", keep=2)
    assert parquet(tmp_path / "c.parquet").to_pylist() == [
        {"n": 1, "output": "b", "day": None},
        {"n": 2**40 + 1, "output": None, "day": "x"},
    ]
    scorer.select(run, tmp_path / "c.jsonl", keep=2)
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    assert lines == ['{"n": 1, "output": "b"}', '{"n": 1099511627777, "day": "x"}']


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.json", "a.jsonl", "folder/"])
def test_nothing_is_kept(tmp_path: Path, name: str) -> None:
    if name == "folder/":
        pytest.importorskip("datasets")
    run = make_run(tmp_path / "run", FLAT, ifd=IFD)
    selection = scorer.select(run, f"{tmp_path}/{name}", keep=2, max_ifd=0.05)
    assert selection.kept.is_empty()
    assert (tmp_path / name).exists()


def test_what_text_can_not_hold_is_named(tmp_path: Path) -> None:
    columns = {
        "gap": pa.array([5], pa.duration("s")),
        "in": pa.array([{"b": b"x"}]),
        "f16": pa.array([0.5], pa.float16()),
    }
    for name, column in columns.items():
        pq.write_table(pa.table({"instruction": ["a"], "output": ["b"], name: column}), tmp_path / f"{name}.parquet")
        run = run_of(tmp_path / name, [tmp_path / f"{name}.parquet"], [1], ifd=[0.5])
        if name == "f16":
            scorer.select(run, tmp_path / "a.jsonl", keep=1)
            assert json.loads((tmp_path / "a.jsonl").read_text())["f16"] == 0.5
        else:
            with pytest.raises(ScorerError, match=f"column '{name}'.* holds (durations|binary)"):
                scorer.select(run, tmp_path / "a.jsonl", keep=1)


def test_times_that_text_would_show_as_others_are_refused(tmp_path: Path) -> None:
    columns = {
        "utc": pa.array([2**63 - 1], pa.timestamp("us", "UTC")),
        "at": pa.array([{"at": -(2**62)}], pa.struct([("at", pa.timestamp("us"))])),
        "day": pa.array([[2**31 - 1]], pa.list_(pa.date32())),
        "time": pa.array([86_400], pa.int32()).view(pa.time32("s")),
    }
    for name, column in columns.items():
        table = pa.table({"instruction": ["a"], "output": ["b"], name: column})
        with pa.ipc.new_file(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
        run = run_of(tmp_path / name, [tmp_path / f"{name}.arrow"], [1], ifd=[0.5])
        with pytest.raises(ScorerError, match=f"column '{name}' holds times"):
            scorer.select(run, tmp_path / "a.jsonl", keep=1)
        scorer.select(run, tmp_path / "a.arrow", keep=1)
        with pa.ipc.open_file(tmp_path / "a.arrow") as file:
            assert file.read_all().equals(table, check_metadata=True)


def test_several_tables_keep_types_and_metadata(tmp_path: Path) -> None:
    field = pa.field("n", pa.uint64(), metadata={"unit": "tokens"})
    schema = pa.schema([pa.field("instruction", pa.large_string()), field], metadata=METADATA)
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    tables = [pa.table([[text] * 2, [2**63 + 5, i]], schema=schema) for i, text in enumerate("ab")]
    for path, table in zip(paths, tables, strict=True):
        pq.write_table(table, path)
    run = run_of(tmp_path / "run", paths, [2, 2], ifd=[0.9, 0.1, 0.8, 0.2])
    scorer.select(run, tmp_path / "c.parquet", keep=2)
    came = pa.concat_tables([table.slice(0, 1) for table in tables])
    assert parquet(tmp_path / "c.parquet").equals(came, check_metadata=True)


NUMBERS = (
    '{"instruction":"a","output":"b","n":0.12345678901234567890123,"m":1E5,"x":1e400,"z":-0,"z":-0.0,'
    '"i":123456789012345678901234567890}'
)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_numbers_and_keys_that_stand_twice_keep_their_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(f"[\n{NUMBERS},\n{NUMBERS}]" if name == "d.json" else f"{NUMBERS}\n{NUMBERS}\n")
    run = run_of(tmp_path / "run", [tmp_path / name], [2], ifd=[0.5, 0.6])
    for output, text in (("a.jsonl", f"{NUMBERS}\n"), ("a.json", f"[\n{NUMBERS}\n]\n")):
        scorer.select(run, tmp_path / output, keep=1)
        assert (tmp_path / output).read_text() == text


def odd_run(folder: Path, line: str) -> Run:
    (folder / "odd.jsonl").write_text(line + "\n")
    return run_of(folder / "odd", [folder / "odd.jsonl"], [1], ifd=[0.5])


@pytest.mark.parametrize(("key", "told"), [("\\u0000", "holds the character 0"), ("\\ud800", "surrogates not allowed")])
def test_keys_that_no_table_holds(tmp_path: Path, capfd: pytest.CaptureFixture[str], key: str, told: str) -> None:
    for line in (f'{{"instruction":"a","output":"b","{key}":1}}', f'{{"output":"b","x":[{{"{key}":1}}]}}'):
        run = odd_run(tmp_path, line)
        for name in ("a.parquet", "a.arrow", "a.csv"):
            with pytest.raises(ScorerError, match=told):
                scorer.select(run, tmp_path / name, keep=1)
        scorer.select(run, tmp_path / "a.jsonl", keep=1)
        assert (tmp_path / "a.jsonl").read_text() == f"{line}\n"
    assert capfd.readouterr() == ("", "")


def test_lists_that_parquet_would_hold_and_not_give_back(tmp_path: Path) -> None:
    run = odd_run(tmp_path, f'{{"instruction":"a","x":{"[" * 60 + "]" * 60}}}')
    with pytest.raises(ScorerError, match=r"JSON Lines .*too deeply nested"):
        scorer.select(run, tmp_path / "a.parquet", keep=1)
    assert not (tmp_path / "a.parquet").exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv"])
def test_what_was_scored_and_is_no_json_now_is_refused(tmp_path: Path, name: str) -> None:
    run = odd_run(tmp_path, '{"instruction":"a","output":"b","x":' + "[" * 600 + "]" * 600 + "}")
    for form in (None, "alpaca") if name != "a.csv" else (None,):
        with pytest.raises(ScorerError, match=r"odd\.jsonl:1: was scored, but is read as bad_json now"):
            scorer.select(run, tmp_path / name, keep=1, form=form)
    with pytest.raises(ScorerError, match="read as bad_json now"):
        scorer.select(run, rejected=tmp_path / name, keep=1, max_ifd=0.1, with_scores=True)
    assert not (tmp_path / name).exists()


def test_dates_from_python(tmp_path: Path) -> None:
    table = pa.table({"instruction": ["a"], "output": ["b"], "day": [datetime.date(2024, 2, 29)]})
    pq.write_table(table, tmp_path / "d.parquet")
    run = run_of(tmp_path / "run", [tmp_path / "d.parquet"], [1], ifd=[0.5])
    scorer.select(run, tmp_path / "a.csv", keep=1)
    assert (tmp_path / "a.csv").read_text() == "instruction,output,day\na,b,2024-02-29\n"
