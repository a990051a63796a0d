"""The kinds of files beside JSON Lines and Parquet: CSV, Arrow, JSON objects, and files that are no data."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from scorer.config import Reading
from scorer.data.dataset import Dataset
from scorer.files import tables
from scorer.files.reader import read_table
from scorer.types import ScorerError

SAMPLE = {"instruction": "Say it.", "output": "It."}
OTHER = {"instruction": "Count.", "output": "One."}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": partial(gzip.compress, mtime=0),
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(path: Path, **options: Any) -> list[Any]:
    """The values of a file's rows, twice: after the file was inspected, and without."""
    with Dataset([path], reading=Reading(**options)) as data:
        data.inspect()
        found = list(data.rows())
        assert [raw.record_id for raw in found] == list(range(data.counts[0]))
    with Dataset([path], reading=Reading(**options)) as data:
        assert list(data.rows()) == found
    return [raw.value for raw in found]


def refusal(path: Path, content: bytes | str, **options: Any) -> str:
    """What a user is told of a file, without its path; one line."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ScorerError) as caught:
        read(path, **options)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".tsv", "\t")])
def test_cells_are_the_texts_that_they_are(tmp_path: Path, suffix: str, mark: str, packed: str) -> None:
    path = tmp_path / f"data{suffix}{packed}"
    text = '\ufeffinstruction,output,input\r\n"Say ""it"",\r\nnow",42,\r\n007,true,  a \r\n\r\nnull,1e3,NA\r\n'
    path.write_bytes(PACK[packed](text.replace('"",', '"";').replace(",", mark).replace(";", ",").encode()))
    assert read(path) == [
        {"instruction": 'Say "it",\r\nnow', "output": "42", "input": ""},
        {"instruction": "007", "output": "true", "input": "  a "},
        {"instruction": "null", "output": "1e3", "input": "NA"},
    ]
    with Dataset([path], limit=2) as data:
        assert [raw.source for raw in data.rows(1)] == [f"{path}[1]"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("instruction,output\na,b\nc\n", "line 3: 1 cells, where the header has 2"),
        ("instruction,output\na,b\nc,d,e\n", "line 3: 3 cells, where the header has 2"),
        ('instruction,output\n"a\nb",c\nd\n', "line 4: 1 cells"),
        ('instruction,output\na,b\n"c"d,e\n', "line 3: this row is no CSV"),
        ('instruction,output\na,b\n"c,d\ne,f\n', "line 3: this row is no CSV (unexpected end of data)"),
        ("instruction,output\na,\xe9\n".encode("latin-1"), "not UTF-8 at line 2"),
        ("instruction;output\na;b\n", "separated by ';', not ','"),
        ("instruction,output,output\na,b,c\n", "names the column 'output' twice"),
        (json.dumps([SAMPLE]), "starts with [, as JSON does"),
        ("subject,body\na,b\n", "its first row holds subject, body"),
        ("instruction,output\n", "there are no records"),
        ("", "there are no records"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path: Path, text: str | bytes, told: str) -> None:
    assert told in refusal(tmp_path / "data.csv", text)


def test_a_table_of_csv_has_numbers(tmp_path: Path) -> None:
    for name, mark in (("a.csv", ","), ("a.tsv.gz", "\t")):
        text = f"record_id{mark}ppl\n0{mark}1.5\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(text, mtime=0) if name.endswith(".gz") else text)
        assert read_table(tmp_path / name).rows() == [(0, 1.5)]


TABLE = {
    "instruction": ["a", "b", None],
    "output": ["x", "é", ""],
    "count": [1, 2**62, None],
    "share": [0.5, 1.0, None],
    "turns": [[{"role": "user", "n": 1}, {"role": "gpt", "n": None}], [], None],
    "day": [datetime.date(2024, 2, 29), None, None],
    "price": [decimal.Decimal("1.50"), None, None],
    "blob": [b"\xff", b"", None],
}
READ = TABLE | {"day": ["2024-02-29", None, None], "price": ["1.50", None, None]}


@pytest.mark.parametrize("make", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "data.feather", "data.ipc"])
def test_arrow_has_the_values_of_parquet(tmp_path: Path, name: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 3)
    path, table = tmp_path / name, pa.table(TABLE)
    table = pa.concat_tables([table] * 4)
    with make(path, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=7)
    pl.DataFrame(pl.from_arrow(table)).write_parquet(tmp_path / "same.parquet")
    rows = [dict(zip(READ, row, strict=True)) for row in zip(*READ.values(), strict=True)] * 4
    assert read(path) == read(tmp_path / "same.parquet") == rows
    for start in range(12):
        for limit in (None, 1, 5, 7, 11):
            with Dataset([path], limit=limit) as data:
                found = [(raw.record_id, raw.source, raw.value) for raw in data.rows(start)]
            assert found == [(i, f"{path}[{i}]", rows[i]) for i in range(start, limit or 12)]


@pytest.mark.parametrize("make", [pa.ipc.new_file, pa.ipc.new_stream])
def test_damaged_arrow(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "data.arrow"
    with make(path, pa.table(TABLE).schema) as writer:
        writer.write_table(pa.table(TABLE))
    whole = path.read_bytes()
    for content in (whole[:30], whole[: len(whole) // 2], whole[:-100], b"", b"not it"):
        assert "truncated or damaged" in refusal(path, content)


FAR = 2**62  # microseconds: in the year 148,104
ODD_COLUMNS: dict[str, pa.Array] = {
    "day": pa.array([2**31 - 1], pa.date32()),
    "at": pa.array([FAR], pa.timestamp("us")),
    "utc": pa.array([FAR], pa.timestamp("us", "UTC")),
    "nowhere": pa.array([0], pa.timestamp("us", "Nowhere/At_all")),
    "ns": pa.array([FAR + 1], pa.timestamp("ns")),
    "gap": pa.array([FAR], pa.duration("ns")),
    "inside": pa.array([[{"at": FAR}]], pa.list_(pa.struct([("at", pa.timestamp("us"))]))),
    "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    "kind": pa.array(["a"]).dictionary_encode(),
    "blob": pa.array([b"\xff"]),
    "u64": pa.array([2**63 + 5], pa.uint64()),
    "half": pa.array([0.5], pa.float16()),
    "twice": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]),
    "view": pa.array(["a"], pa.string_view()),
    "nulls": pa.array([[None, None]], pa.large_list(pa.field("element", pa.null()))),
    "lists": pa.array([[1]], pa.list_view(pa.int64())),
    "calendar": pa.array([pa.MonthDayNano([1, 2, 3])]),
    "spans": pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["a"])),
    "union": pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1]), pa.array(["a"])]),
}


@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_no_column_keeps_the_others_from_being_read(tmp_path: Path, name: str) -> None:
    table = pa.table({"instruction": ["Say it."], name: ODD_COLUMNS[name], "output": ["It."]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    paths = [tmp_path / "a.arrow"]
    if name not in ("lists", "calendar", "spans", "union"):  # which Parquet hasn't
        pq.write_table(table, tmp_path / "a.parquet")
        paths.append(tmp_path / "a.parquet")
    for path in paths:
        [row] = read(path)
        assert {key: row[key] for key in SAMPLE} == SAMPLE
        if name in ("ns", "map", "kind", "blob", "u64", "half", "view", "nulls"):
            assert row[name] == {
                "ns": "2116-02-20 23:53:38.427387905",
                "map": [{"key": "a", "value": 1}],
                "kind": "a",
                "blob": b"\xff",
                "u64": 2**63 + 5,
                "half": 0.5,
                "view": "a",
                "nulls": [None, None],
            }[name]  # fmt: skip


def test_columns_of_one_name(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"], ["c"]], ["instruction", "output", "output"]), tmp_path / "whole.parquet")
    told = refusal(tmp_path / "a.parquet", (tmp_path / "whole.parquet").read_bytes())
    assert "two columns have the name 'output'" in told


# One object on one line of JSON Lines is a record, whatever it holds.
@pytest.mark.parametrize(("suffix", "indent"), [(".json", None), (".json", 1), (".jsonl", 1), (".json.gz", None)])
@pytest.mark.parametrize(
    ("content", "options", "rows"),
    [
        ({"data": [SAMPLE, OTHER]}, {}, [SAMPLE, OTHER]),
        ({"version": 1, "about": {"rows": [OTHER]}, "tags": ["a"], "train": [SAMPLE]}, {}, [SAMPLE]),
        ({"train": [SAMPLE], "test": [OTHER]}, {"records_at": "test"}, [OTHER]),
        ({"result": {"rows": [SAMPLE]}}, {"records_at": "result.rows"}, [SAMPLE]),
        ({"a.b": [SAMPLE]}, {"records_at": "a.b"}, [SAMPLE]),
        (SAMPLE | {"similar": [OTHER]}, {}, [SAMPLE | {"similar": [OTHER]}]),
        (SAMPLE | {"similar": [OTHER]}, {"records_at": "similar"}, [OTHER]),
        (CHAT, {}, [CHAT]),
        ({"q": "a", "a": "b", "notes": [OTHER]}, {"columns": {"prompt": "q", "response": "a"}}, None),
    ],
)
def test_objects_around_records_and_objects_that_are_one(
    tmp_path: Path, suffix: str, indent: int | None, content: Any, options: Any, rows: Any
) -> None:
    text = json.dumps(content, indent=indent).encode()
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(text, mtime=0) if suffix.endswith(".gz") else text)
    assert read(path, **options) == (rows or [content])


def test_objects_one_after_another(tmp_path: Path) -> None:
    for name in ("data.json", "data.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row, indent=2) for row in (SAMPLE, OTHER, CHAT)) + "\n")
        assert read(path) == [SAMPLE, OTHER, CHAT]


@pytest.mark.parametrize(
    ("content", "at", "told"),
    [
        ({"train": [SAMPLE], "test": [OTHER]}, None, "at train, test: choose one, --records-at train"),
        ({"result": {"rows": [SAMPLE]}}, None, "at result.rows: choose one, --records-at result.rows"),
        ({"train": [SAMPLE]}, "rows", "--records-at rows: no list is there; lists of objects are at: train"),
        ({"train": {"a": 1}}, "train", "no list is there; lists of objects are at: nowhere"),
        ([SAMPLE], "train", "holds an array, not an object around one: leave out --records-at train"),
        ({"subject": "a", "notes": []}, None, "its first row holds subject, notes"),
        ({"data": [1, 2]}, None, "no list of objects is in it"),
        ({"data": []}, None, "no list of objects is in it"),
        ({}, None, "no list of objects is in it"),
    ],
)
def test_objects_in_which_records_are_not_found(tmp_path: Path, content: Any, at: str | None, told: str) -> None:
    assert told in refusal(tmp_path / "data.json", json.dumps(content), records_at=at)


def test_records_at_is_not_ignored(tmp_path: Path) -> None:
    lines = f"{json.dumps(SAMPLE)}\n{json.dumps(OTHER)}\n"
    assert "several JSON values: leave out --records-at a" in refusal(tmp_path / "d.jsonl", lines, records_at="a")
    assert "is for JSON files: leave it out" in refusal(tmp_path / "d.csv", "instruction,output\n", records_at="a")


def test_objects_that_are_nested_too_deep(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "data.json", '{"a": \n' * 990 + "1" + "}" * 990)


def test_a_document_has_the_depth_limit_of_a_line(tmp_path: Path) -> None:
    for levels, told in ((100, "no list of objects"), (101, "nests deeper than 100 levels"), (9000, "nests deeper")):
        assert told in refusal(tmp_path / "data.json", '{"a":\n' * levels + "1" + "}" * levels)


def test_a_header_of_many_columns(tmp_path: Path) -> None:
    header = ",".join(f"c{i}" for i in range(100_000))
    told = refusal(tmp_path / "data.csv", f"{header}\n{header}\n")
    assert "c0, c1" in told
    assert len(told) < 1000


def test_several_values_that_are_not_all_objects(tmp_path: Path) -> None:
    assert "not all objects" in refusal(tmp_path / "data.json", "{\n}\n[2]")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("data.xlsx", "save its sheet as CSV"),
        ("data.TXT", "name it .jsonl"),
        ("data.zip", "unpack it"),
        ("data.tar.gz", "unpack it"),
        ("data.pkl", "may run code"),
        ("data.jsonl.bz2", "decompress it"),
        ("data", "convert it to one of these"),
    ],
)
def test_kinds_that_are_not_read(tmp_path: Path, name: str, told: str) -> None:
    text = refusal(tmp_path / name, "a")
    assert told in text
    assert "scorer reads JSON (.json, .jsonl, .ndjson) and CSV" in text


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("data.jsonl", gzip.compress(b"{}", mtime=0), "is gzip, whatever its name says; add .gz"),
        ("data.csv", zstandard.compress(b"a"), "is Zstandard"),
        ("data.jsonl.gz", zstandard.compress(b"a"), "is Zstandard"),
        ("data.json", b"PAR1\x15\x04PAR1", "is Parquet, whatever its name says; name it .parquet"),
        ("data.jsonl.gz", gzip.compress(b"PAR1\x15\x04PAR1", mtime=0), "is Parquet"),
        ("data.parquet", b"ARROW1\x00\x00", "is Arrow"),
        ("data.csv", b"PK\x03\x04", "an Excel workbook"),
        ("data.jsonl", "{}".encode("utf-32"), "UTF-32"),
        ("data.parquet", b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        ("data.jsonl", b"<!DOCTYPE html>", "a web page"),
        ("data.json", b"instruction,output\nSay it.,It.\n", "it starts with 'instruction,output'"),
    ],
)
def test_names_that_say_another_kind(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    assert told in refusal(tmp_path / name, content)
