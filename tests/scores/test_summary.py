"""The summary of a score table, by hand."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from scorer.scores.measures import SCHEMA
from scorer.scores.summary import QUANTILES, summarise


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame([{"turn": 0, "status": "ok", **row} for row in rows], schema=SCHEMA)


def test_quantiles_statuses_and_length_bias() -> None:
    # ifd falls as length grows, but for the last pair, which are swapped: ranks 5 4 3 1 2 against 1 2 3 4 5
    ifd = [0.9, 0.8, 0.7, 0.1, 0.2]
    rows: list[dict[str, Any]] = [
        {"record_id": i, "ifd": ifd[i], "response_tokens": 10 * i + 10, "prompt_tokens": 3} for i in range(5)
    ]
    # a row without scores counts as a status only, though its prompt was tokenised
    rows += [{"record_id": 5 + i, "status": "prompt_too_long", "prompt_tokens": 2000} for i in range(2)]
    summary = summarise(table(rows))
    assert summary.status == {"ok": 5, "prompt_too_long": 2}
    assert list(summary.quantiles) == ["ifd", "prompt_tokens", "response_tokens"]  # only columns that hold anything
    assert QUANTILES == (0.0, 0.1, 0.5, 0.9, 1.0)
    assert summary.quantiles["response_tokens"] == [10, 14, 30, 46, 50]
    assert summary.quantiles["ifd"] == pytest.approx([0.1, 0.14, 0.7, 0.86, 0.9])
    assert summary.quantiles["prompt_tokens"] == [3] * 5
    assert summary.length_bias == pytest.approx(1 - 6 * (16 + 4 + 0 + 9 + 9) / (5 * 24))


@pytest.mark.parametrize("ifd", [[0.5, 0.6], [0.5, 0.5, 0.5], [None, None, None]])
def test_no_bias_where_it_has_no_meaning(ifd: list[float | None]) -> None:
    rows = [{"record_id": i, "ifd": value, "response_tokens": i + 1} for i, value in enumerate(ifd)]
    assert summarise(table(rows)).length_bias is None


def test_a_table_without_any_score() -> None:
    summary = summarise(table([{"record_id": 0, "status": "bad_json"}]))
    assert (summary.status, summary.quantiles, summary.length_bias) == ({"bad_json": 1}, {}, None)
