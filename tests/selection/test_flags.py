"""Flags for noise: what bears one, and what only looks as if."""

from __future__ import annotations

import math

import polars as pl
import pytest

from scorer.selection.flags import FLAGS, REFUSALS, score_flags, text_flags
from scorer.types import Message, Record, RowStatus, ScorerError, Turn


def scores(**columns: list[float | None]) -> pl.DataFrame:
    count = len(next(iter(columns.values())))
    return pl.DataFrame({"record_id": range(count), **columns})


def text(*responses: str) -> list[Record]:
    return [Record(i, "", (Turn((Message("user", "q"),), text),)) for i, text in enumerate(responses)]


def flagged(table: pl.DataFrame, name: str) -> list[int]:
    return table.filter(pl.col(name))["record_id"].to_list()


def test_ifd_above_1() -> None:
    table = score_flags(scores(ifd=[0.9, 1.0, 1.01, None, math.nan]), ["ifd_above_1"])
    assert table.schema["ifd_above_1"] == pl.Boolean
    assert flagged(table, "ifd_above_1") == [2]


def test_gibberish_is_far_out_in_robust_deviations() -> None:
    # logs 1, 2, 3, 4, 5: median 3, median deviation 1 (of 2, 1, 0, 1, 2); a sixth far one moves neither much
    logs = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert flagged(score_flags(scores(ppl_alone=[math.exp(v) for v in logs]), ["gibberish"]), "gibberish") == []
    # 7 values, median 3, deviations 2 1 0 0 1 2 x: median 1; 0.6745 (x - 3) > 3.5 from x = 8.19
    for far, ids in ((8.1, []), (8.3, [6]), (-10.0, [])):
        values: list[float | None] = [math.exp(v) for v in (1.0, 2.0, 3.0, 3.0, 4.0, 5.0, far)]
        assert flagged(score_flags(scores(ppl_alone=values), ["gibberish"]), "gibberish") == ids
    same: list[float | None] = [2.0, 2.0, 2.0, 9.0]  # no deviation to measure by
    assert flagged(score_flags(scores(ppl_alone=same), ["gibberish"]), "gibberish") == []


def test_a_record_is_flagged_by_any_turn() -> None:
    table = pl.DataFrame({"record_id": [1, 0, 0, 1], "ifd": [0.5, 0.5, 1.5, None]})
    assert score_flags(table, ["ifd_above_1"]).rows() == [(0, True), (1, False)]
    turns = tuple(Turn((Message("user", "q"),), text) for text in ("Fine.", "I cannot help."))
    assert text_flags([Record(4, "", turns)], ["refusal"]).rows() == [(4, True)]


def test_a_measure_that_is_not_there() -> None:
    with pytest.raises(ScorerError, match="gibberish needs ppl_alone"):
        score_flags(scores(ifd=[0.5], ppl_alone=[None]), ["gibberish"])


def test_empty_or_link_only() -> None:
    yes = ["https://example.org/a?b=c", " <http://a.b> ", "[](https://a.b)", "www.a.org\nhttp://b.org", "\u200b \n", ""]
    no = ["See https://example.org", "+", "...", "日本", "42 https://a.b", "http"]
    table = text_flags(text(*yes, *no), ["empty_or_link_only"])
    assert flagged(table, "empty_or_link_only") == list(range(len(yes)))


def test_refusal() -> None:
    yes = [
        "I'm sorry, but I can't.",
        "  As an AI language model, I",
        "I’m unable to",
        "I CANNOT do that",
        "Sorry, I can't",
    ]
    no = ["I'm sorry for your loss", "As an aide, you", "He said: I cannot", "Sorry seems to be", "", "I cannoli"]
    assert flagged(text_flags(text(*yes, *no), ["refusal"]), "refusal") == list(range(len(yes)))
    assert all(opening == opening.casefold() and "’" not in opening for opening in REFUSALS)


def test_records_that_failed_are_not_flagged_but_for_the_empty() -> None:
    records = [
        Record(0, "", status=RowStatus.BAD_JSON),
        Record(1, "", (Turn((), "", status=RowStatus.NOT_TEXT),)),
        Record(2, "", (Turn((), " ", status=RowStatus.EMPTY_RESPONSE),)),
    ]
    table = text_flags(records, ["empty_or_link_only", "refusal"])
    assert table.rows() == [(0, False, False), (1, False, False), (2, True, False)]
    assert set(table.columns[1:]) < set(FLAGS)
