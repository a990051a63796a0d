"""Elements of JSON arrays, with their texts."""

from __future__ import annotations

import gzip
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scorer.files.raw import RawRecord
from scorer.files.reader import InputReader

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def array_rows(path: Path, first_id: int = 0) -> list[RawRecord]:
    with closing(InputReader(path)) as reader:
        return list(reader.rows(first_id))


def test_texts_stand_as_they_are_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(b'\xef\xbb\xbf \r\n[ {"a" : 1.0E+2,\r\n\t"a":"]\\n,"} ,\n[\n] , 1e999 ]\n')
    rows = list(array_rows(path, 7))
    assert [raw.text for raw in rows] == ['{"a" : 1.0E+2, "a":"]\\n,"}', "[ ]", "1e999"]
    assert [raw.value for raw in rows] == [{"a": "]\n,"}, [], float("inf")]
    assert [(raw.record_id, raw.source) for raw in rows] == [(7 + i, f"{path}[{i}]") for i in range(3)]


@pytest.mark.parametrize("text", ["", " \n", "[]", "[ \n ]"])
def test_arrays_without_elements(tmp_path: Path, text: str) -> None:
    (tmp_path / "d.json").write_text(text)
    assert list(array_rows(tmp_path / "d.json")) == []


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".json.zst"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(VALUES, max_size=5), indent=st.sampled_from([None, 0, 2, "\t"]), ascii_only=st.booleans())
def test_any_array(tmp_path: Path, suffix: str, values: list[Any], indent: Any, ascii_only: bool) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    if suffix == ".json.gz":
        data = gzip.compress(data)
    elif suffix == ".json.zst":  # of two frames
        pack = zstandard.ZstdCompressor().compress
        data = pack(data[:3]) + pack(data[3:])
    path = tmp_path / f"d{suffix}"
    path.write_bytes(data)
    rows = list(array_rows(path))
    assert [raw.value for raw in rows] == values
    for raw in rows:
        assert raw.text is not None
        assert "\n" not in raw.text
        assert json.loads(raw.text) == raw.value
