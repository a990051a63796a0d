"""Raw values to bytes, in every kind of file: what is written is read again, or refused, and whole or absent."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scorer.data.dataset import Dataset
from scorer.files.writer import RecordWriter
from scorer.storage.atomic import replacing
from scorer.types import ScorerError
from tests.lib.files import JSON_NAMES, NAMES, ROWS, write


def values(path: Path) -> list[Any]:
    return [raw.value for raw in Dataset([path]).rows()]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    assert values(path) == ROWS
    assert [p.name for p in tmp_path.iterdir()] == [name]  # no temporary file is left


@pytest.mark.parametrize("name", JSON_NAMES)
def test_lone_surrogates_go_out_as_they_came_in(tmp_path: Path, name: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"a": "\\\\\\ud800 \\udc00 \\ud83d\\ude42"}\n')
    rows = values(source)
    assert rows == [{"a": "\\\ud800 \udc00 🙂"}]
    assert values(write(tmp_path / name, rows)) == rows


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    assert write(tmp_path / "d.json", [{"a": "é"}, "b"]).read_bytes() == '[\n{"a": "é"},\n"b"\n]\n'.encode()
    assert write(tmp_path / "d.jsonl", [{"a": "🙂"}]).read_bytes() == '{"a": "🙂"}\n'.encode()


def values_of(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | numbers | st.text(st.characters()),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    )


in_json = values_of(st.floats(allow_nan=False, allow_infinity=False))
in_parquet = values_of(st.floats(allow_nan=False))


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.jsonl.gz", "d.ndjson.zst"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.text(max_size=5), in_json, max_size=4), min_size=2, max_size=5))
def test_any_json_rows_round_trip(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    rows = json.loads(json.dumps(rows))  # two lone surrogates that make a pair are one character in JSON
    assert values(write(tmp_path / name, rows)) == rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.sampled_from("abc"), in_parquet, min_size=1, max_size=3), min_size=1, max_size=5)
)
def test_parquet_holds_rows_as_they_are_or_refuses(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "d.parquet"
    try:
        write(path, rows)
    except ScorerError as error:
        assert ".jsonl" in str(error)  # noqa: PT017 (either outcome is right)
        return
    for row, back in zip(rows, values(path), strict=True):
        assert {k: without_nulls(v) for k, v in row.items() if v is not None} == without_nulls(back)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("rows", [[{"a": 1}, {"a": "x"}], [{"a": "\ud800"}], [{"a": True}, {"a": 2}], ["text"]])
def test_parquet_refuses_what_it_would_change(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(ScorerError, match=r"\.jsonl"):
        write(tmp_path / "d.parquet", rows)
    assert list(tmp_path.iterdir()) == []


def test_parquet_values_in_json(tmp_path: Path) -> None:
    [out] = values(write(tmp_path / "d.jsonl", [{"day": datetime.date(2024, 2, 29)}]))
    assert out == {"day": "2024-02-29"}
    with pytest.raises(ScorerError, match="bytes"):
        write(tmp_path / "e.jsonl", [{"image": b"\x00"}])


@pytest.mark.parametrize("name", JSON_NAMES)
def test_json_has_no_infinity(tmp_path: Path, name: str) -> None:
    for number in ("inf", "-inf", "nan"):
        with (
            pytest.raises(ScorerError, match=r"in\.jsonl:7 .*infinite or NaN"),
            RecordWriter(tmp_path / name) as writer,
        ):
            writer.write({"a": [float(number)]}, source="in.jsonl:7")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in JSON_NAMES if ".jsonl" in name or ".ndjson" in name])
def test_a_line_s_own_text_is_written(tmp_path: Path, name: str) -> None:
    line = '{"a":1e999,"b":0.10000000000000000001, "b" : "\\u00e9é"}'
    (tmp_path / "in.jsonl").write_text(line)
    [raw] = Dataset([tmp_path / "in.jsonl"]).rows()
    with RecordWriter(tmp_path / name) as writer:
        writer.write(raw.value, text=raw.text)
    [back] = Dataset([tmp_path / name]).rows()
    assert back.text == line


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "d.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(Path("far", "d.jsonl"))
    for rows in (ROWS[:1], ROWS):  # a target that is not there yet, and one that is
        write(link, rows)
        assert link.is_symlink()
        assert not target.is_symlink()
        assert values(target) == rows
    with pytest.raises(ZeroDivisionError):
        write(link, ({"a": 1 // (2 - i)} for i in range(3)))
    assert values(link) == ROWS
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["d.jsonl", "far", "link.jsonl"]


def test_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    for name in NAMES:
        path = write(tmp_path / name, ROWS)
        with pytest.raises(ZeroDivisionError):
            write(path, ({"a": 1 // (2 - i)} for i in range(3)))
        assert values(path) == ROWS
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(NAMES)


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, text in (
        (tmp_path / "file" / "d.json", "file is a file, not a folder"),
        (tmp_path / "file" / "none" / "d.json", "file is a file, not a folder"),
        (tmp_path / "d.txt", ".jsonl.zst"),
        (Path("/proc/d.json"), "/proc/d.json"),
    ):
        with pytest.raises(ScorerError, match=text):
            write(path, ROWS)
    (tmp_path / "d.json").mkdir()
    with pytest.raises(ScorerError, match="is a folder"):
        write(tmp_path / "d.json", ROWS)


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "x"
    with pytest.raises(ScorerError, match="can't be written") as caught, replacing(place) as temporary:
        temporary.write_text("")
    assert str(place) in str(caught.value)


FILL = """
import random, sys
from pathlib import Path
from scorer.types import EngineError
from scorer.files.writer import RecordWriter
try:
    with RecordWriter(Path(sys.argv[1]) / sys.argv[2]) as writer:
        for i in range(3000):
            writer.write({"a": random.randbytes(500).hex()})
except EngineError as error:
    print(error)
print(list(Path(sys.argv[1]).iterdir()))
"""


@pytest.mark.parametrize("name", ["d.json", "d.jsonl.gz", "d.jsonl.zst", "d.parquet"])
def test_full_disk(tmp_path: Path, name: str) -> None:
    inside = 'mount -t tmpfs -o size=200k tmpfs "$1" && exec "$2" -c "$3" "$1" "$4"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a small disk")
    command = [*unshare, "sh", "-c", inside, "sh", str(tmp_path), sys.executable, FILL, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the disk is full" in done.stdout
    assert done.stdout.endswith("[]\n")
