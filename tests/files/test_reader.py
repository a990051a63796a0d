"""Bytes to raw values, in every kind of file, and what a user is told of a file that cannot be read."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from scorer.data.dataset import Dataset, InputFile, inspect_input
from scorer.files.raw import RawRecord
from scorer.files.reader import InputReader
from scorer.types import RowStatus, ScorerError
from tests.lib.files import JSON_NAMES, NAMES, ROWS, write


def read_raw(
    paths: Sequence[Path], *, start: int = 0, limit: int | None = None, counts: Sequence[int] = ()
) -> Iterator[RawRecord]:
    with Dataset(paths, limit=limit, counts=counts) as data:
        yield from data.rows(start)


def count_records(path: Path) -> int:
    return InputReader(path).scan().rows


def values(*paths: Path, start: int = 0, limit: int | None = None) -> list[Any]:
    return [raw.value for raw in read_raw(paths, start=start, limit=limit)]


def refusal(path: Path) -> str:
    with pytest.raises(ScorerError) as caught:
        list(read_raw([path]))
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", NAMES)
def test_start_and_limit_count_over_all_files(tmp_path: Path, name: str) -> None:
    paths = [
        write(tmp_path / "a.jsonl", ROWS[:3]),
        write(tmp_path / name, ROWS[3:6]),
        write(tmp_path / "c.json", ROWS[6:]),
    ]
    assert sum(map(count_records, paths)) == 10
    for start in range(12):
        for limit in (None, 1, 3, 5, 6, 10, 20):
            found = list(read_raw(paths, start=start, limit=limit))
            ids = list(range(start, min(10, 10 if limit is None else limit)))
            assert [raw.record_id for raw in found] == ids
            assert [raw.value for raw in found] == [ROWS[i] for i in ids]
    assert [raw.source for raw in read_raw(paths, start=5, limit=7)][1] == f"{tmp_path}/c.json[0]"


def test_skipped_rows_of_parquet_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.parquet"
    pl.DataFrame({"n": range(1000)}).write_parquet(path, row_group_size=300)
    monkeypatch.setattr("scorer.files.tables.BATCH_ROWS", 70)
    assert [row["n"] for row in values(path, start=137, limit=913)] == list(range(137, 913))


def test_lines_are_numbered_from_one_and_blank_ones_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"a": 1}\r\n  \r\n{"a": NaN\n{"a": "\xff"}\n[1]\n{"a": Infinity}')
    found = list(read_raw([path]))
    assert [raw.source for raw in found] == [f"{path}:{line}" for line in (2, 4, 5, 6, 7)]
    assert [raw.value for raw in found] == [{"a": 1}, '{"a": NaN', '{"a": "\\xff"}', [1], {"a": float("inf")}]
    bad = RowStatus.BAD_JSON
    assert [raw.status for raw in found] == [RowStatus.OK, bad, bad, RowStatus.OK, RowStatus.OK]


def test_deep_json_and_endless_integers_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = {
        '{"a": 1}': "ok",
        "[" * 100_000: "bad_json",
        '{"a": ' + "1" * 5000 + "}": "bad_json",
        "[" * 100 + "]" * 100: "ok",
        "[" * 101 + "]" * 101: "bad_json",
        '{"a":' * 981 + "1" + "}" * 981: "bad_json",
        "[" + "[]," * 500 + '"' + "[{" * 500 + '\\\\"]': "ok",  # many, one beside another, and in a text
        '{"a": ' + "[" * 101 + "]" * 101 + ', "a": 1}': "bad_json",  # in a value that another replaces
    }
    path.write_text("\n".join(lines))
    for exact in (True, False):
        with Dataset([path]) as data:
            assert [raw.status for raw in data.rows(exact=exact)] == list(lines.values())


def deeper(levels: int, then: Callable[[], Any]) -> Any:
    return deeper(levels - 1, then) if levels else then()


def test_whether_a_line_is_json_does_not_depend_on_who_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("[" * 100 + "]" * 100)
    assert deeper(700, lambda: next(iter(read_raw([path]))).status) is RowStatus.OK


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_and_documents_have_a_limit(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packs: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
    pack = packs[suffix]
    monkeypatch.setattr("scorer.files.streams.LINE_BYTES", 1 << 20)
    monkeypatch.setattr("scorer.files.json_files.LINE_BYTES", 1 << 20)
    monkeypatch.setattr("scorer.files.json_files.DOCUMENT_BYTES", 4 << 20)
    for name, begin, more, told in (
        ("d.jsonl", b'{"a": 1}\n', b"\0", "line 2 has 1 MiB or more"),
        ("d.jsonl", b'\n{"a": "', b"a", "line 2 has 1 MiB or more"),
        ("d.jsonl", b"", b" ", "is blank up to line"),
        ("d.json", b"", b"\0", "it starts with"),
        ("d.json", b"[1,\n", b"2,\n", "over 4 MiB, the limit of a JSON document, in line"),
        ("d.json", b"[", b"2,", "over 4 MiB, the limit of a JSON document, in line 1"),
        ("d.csv", b"a,b\n", b"\0", "line 2 has 1 MiB or more"),
        ("d.csv", b"a,b\n", b'"\n",', "line 2 has 1 MiB or more"),
    ):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(pack(begin + more * ((5 << 20) // len(more))))
        assert told in refusal(path)
    path = tmp_path / "d.json"
    path.write_text(f'["{"a" * (2 << 20)}"]')  # one line, of a document
    assert len(values(path)[0]) == 2 << 20


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    "text",
    ['[{"a": 1}, {"a": 2}]', ' \n[\n {"a": 1},\n {"a": 2}\n]\n', '[{"a": 1},\n{"a": 2}]', '{"a": 1}\n{"a": 2}\n'],
)
def test_content_tells_arrays_from_lines(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"d.{suffix}"
    for bom in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(bom + text.encode())
        assert values(path) == [{"a": 1}, {"a": 2}]


def test_text_where_an_array_is_expected(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text("instruction,output\nSay 1.,1\n")
    assert "is not JSON: it starts with 'instruction,output'" in refusal(path)


def test_invalid_array_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('[\n{"a": 1},\n{"a": }\n]')
    assert "line 3, column 7" in refusal(path)
    path.write_bytes(b'[\n"\xff"]')
    assert "not UTF-8 at line 2" in refusal(path)
    path.write_text("[" * 100_000)
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("name", JSON_NAMES)
def test_files_without_records(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [])
    assert "hold no records" in refusal(path)
    path.write_bytes(b"")
    assert "hold no records" in refusal(path)
    assert count_records(path) == 0
    full = write(tmp_path / "full.jsonl", ROWS)
    assert values(path, full) == ROWS
    assert values(full, path, start=10) == []


def test_empty_table_and_no_inputs(tmp_path: Path) -> None:
    assert "hold no records" in refusal(write(tmp_path / "d.parquet", []))
    with pytest.raises(ScorerError, match="hold no records"):
        list(read_raw([]))


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.json.gz", "d.jsonl.zst", "d.json.zst", "d.parquet"])
def test_truncated_and_damaged_files(tmp_path: Path, name: str) -> None:
    rows = [{"a": hashlib.sha256(str(i).encode()).hexdigest()} for i in range(5000)]
    path = write(tmp_path / name, rows)
    whole = path.read_bytes()
    holed = whole[:1000] + b"\xff" * 2000 + whole[3000:]
    if name == "d.parquet":  # its pages carry no checksum; its footer can be checked
        holed = whole[:-100] + b"\xff" * 92 + whole[-8:]
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:30], b"not it", holed):
        path.write_bytes(data)
        assert "truncated or damaged" in refusal(path)


def test_compressed_files_of_several_parts(tmp_path: Path) -> None:
    one, two = b'{"a": 1}\n', b'{"a": 2}\n' * 50_000
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(one) + gzip.compress(two))
    pack = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # as pzstd writes in front of every frame
    (tmp_path / "d.jsonl.zst").write_bytes(skippable + pack(one) + pack(two))
    for name in ("d.jsonl.gz", "d.jsonl.zst"):
        assert sum(row["a"] for row in values(tmp_path / name)) == 100_001


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.json")
    assert "is a folder" in refusal(tmp_path)
    assert "File name too long" in refusal(tmp_path / f"{'long' * 80}.json")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "not a regular file" in refusal(tmp_path / "pipe.jsonl")
    with pytest.raises(ScorerError, match="no such file"):
        inspect_input(tmp_path / "missing.json")
    # found before anything is read
    with pytest.raises(ScorerError, match="no such file"):
        next(read_raw([write(tmp_path / "a.jsonl", ROWS), tmp_path / "missing.json"]))


@pytest.mark.parametrize("name", [b"d\xff.jsonl", b"f\xff/d.jsonl"])
def test_names_that_are_not_utf8_are_to_be_renamed(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"a": 1}\n')
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    shown = f"{tmp_path}/{name.decode('utf-8', 'backslashreplace')}"
    for read in (inspect_input, lambda path: Dataset([path])):
        with pytest.raises(ScorerError, match="rename it") as caught:
            read(path)
        assert str(caught.value).encode().startswith(shown.encode())


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz"])
def test_utf16_is_to_be_converted(tmp_path: Path, name: str, encoding: str) -> None:
    data = '\ufeff[\n{"a": 1}\n]\n'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert "convert it to UTF-8" in refusal(tmp_path / name)
    with pytest.raises(ScorerError, match="UTF-16"):
        count_records(tmp_path / name)


def test_a_line_that_is_json_keeps_its_text(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a":1e999,"a":2} \r\n{"a": "\xff"}\n[')
    assert [raw.text for raw in read_raw([path])] == ['{"a":1e999,"a":2} ', None, None]


def test_the_fast_parser_differs_in_endless_integers_only(tmp_path: Path) -> None:
    lines = [
        b'{"a": NaN, "b": -Infinity, "c": 1e999}',
        b'{"a": "\\ud800", "b": "\\ud83d\\ude00", "a": 1.10}',
        b'{"a": "\xff"}',
        b'{"a": 1,}',
        b'{"a": 18446744073709551615, "b": -9223372036854775808}',
        b'\xef\xbb\xbf{"a": 0}',
        b'  {"a": "tab\there"}\r',
        b"[" * 900 + b"]" * 900,
    ]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join(lines))
    with Dataset([path]) as data:
        fast, exact = (list(data.rows(exact=exact)) for exact in (False, True))
    assert repr(fast) == repr(exact)  # NaN is not equal to itself
    path.write_bytes(b'{"a": 18446744073709551616}')
    with Dataset([path]) as data:
        (fast_row,), (exact_row,) = data.rows(exact=False), data.rows()
    assert (exact_row.value, fast_row.value) == ({"a": 2**64}, {"a": float(2**64)})
    assert fast_row.text == exact_row.text == '{"a": 18446744073709551616}'


def test_inspect_input_describes_the_bytes_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, example B.1
    found = inspect_input(path)
    assert found == InputFile(str(path), 3, digest, modified_ns=path.stat().st_mtime_ns)
    path.write_bytes(b"abd")
    os.utime(path, ns=(0, path.stat().st_mtime_ns))
    assert inspect_input(path, found).identity != found.identity


PEAK = """
import sys
from pathlib import Path
from scorer.data.dataset import Dataset
data = Dataset([sys.argv[1]])
data.inspect()
rows = sum(len(record.turns) for record in data.records())
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(rows, int(status["VmHWM"].split()[0]) >> 10)  # not ru_maxrss: that of the process which started this one counts
"""


def peak(path: Path) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    rows, mib = map(int, done.stdout.split())
    return rows, mib


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    number = pl.int_range(60_000)
    rows = pl.select(
        instruction=pl.format("Say {} in words.", number),
        output=number.hash(1).cast(pl.String).repeat_by(100).list.join(" "),
    )  # 120 MB of text
    rows.write_parquet(tmp_path / "d.parquet", row_group_size=60_000)
    rows.write_ndjson(tmp_path / "d.jsonl")
    rows.write_csv(tmp_path / "d.csv")
    table = rows.to_arrow()
    for name, size in (("one.arrow", 60_000), ("many.arrow", 1000)):
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=size)
    rows.head(2000).write_parquet(tmp_path / "small.parquet")
    _, small = peak(tmp_path / "small.parquet")
    # Parquet: a column chunk as it is on disk, and some rows. Arrow: a record batch, and some rows.
    allowed = {"d.parquet": 160, "d.jsonl": 40, "d.csv": 40, "one.arrow": 200, "many.arrow": 200}
    for name, most in allowed.items():
        count, mib = peak(tmp_path / name)
        assert count == 60_000
        assert mib - small < most, (name, small, mib)


def test_a_file_whose_rows_are_all_skipped_is_not_opened(write_jsonl: Callable[..., Path]) -> None:
    first, second = write_jsonl([{"n": 0}, {"n": 1}], "a.jsonl"), write_jsonl([{"n": 2}, {"n": 3}], "b.jsonl")
    first.write_bytes(b"\xff\xfe")  # UTF-16, which is refused wherever it is read
    rows = read_raw([first, second], start=3, counts=[2, 2])
    assert [(row.record_id, row.value) for row in rows] == [(3, {"n": 3})]
    with pytest.raises(ScorerError, match="UTF-16"):
        list(read_raw([first, second], start=1, counts=[2, 2]))


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_of_another_length_moves_no_ids(write_jsonl: Callable[..., Path], count: int) -> None:
    first, second = write_jsonl([{"n": i} for i in range(count)], "a.jsonl"), write_jsonl([{"n": 9}], "b.jsonl")
    rows = read_raw([first, second], counts=[2, 1])
    seen: list[int] = []
    with pytest.raises(ScorerError, match=r"a\.jsonl: changed while it was read"):
        seen.extend(row.value["n"] for row in rows)
    assert seen == [0, 1][:count]
    assert [row.value["n"] for row in read_raw([first, second], counts=[count, 1])][-1] == 9
    assert len(list(read_raw([first, second], counts=[count, 1], limit=1))) == 1


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet", "d.arrow"])
def test_files_that_are_cut_or_removed_while_they_are_read(tmp_path: Path, name: str) -> None:
    rows = [{"instruction": hashlib.sha256(str(i).encode()).hexdigest(), "output": str(i)} for i in range(60_000)]
    path, table = write(tmp_path / name, rows), pa.Table.from_pylist(rows)
    if name == "d.parquet":
        pq.write_table(table, path, row_group_size=1000)
    if name == "d.arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    with Dataset([path]) as data:
        data.inspect()
        found = data.rows()
        next(found)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ScorerError, match=r"truncated or damaged|changed while it was read|no CSV|cells, where"):
            list(found)
    path = write(tmp_path / name, rows)
    with Dataset([path]) as data:
        data.inspect()
        path.unlink()  # what is open stays
        assert len(list(data.rows())) == len(rows)


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (32, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from scorer.data.dataset import Dataset
with Dataset(sys.argv[1:]) as data:
    data.inspect()
    print(len(list(data.rows())), data.height)
"""


def test_many_files_where_few_may_be_open(write_jsonl: Callable[..., Path]) -> None:
    paths = [write_jsonl([{"instruction": "a", "output": "b"}], f"{i}.jsonl") for i in range(50)]
    command = [sys.executable, "-c", FEW_FILES, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["50", "50"]
