"""Flags for noise that a ranking lets through: the score table or the texts -> a Boolean column for each flag.

A record has a flag if any of its turns has it; null is unknown. `scorer cluster --flags` computes the flags that need
embeddings (STORED). SelectConfig.drop_flagged says which flagged records a selection drops.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

import polars as pl

from scorer.types import Record, RowStatus, ScorerError

# The modified z-score of Iglewicz and Hoaglin (1993), and their limit for outliers.
MAD_TO_SIGMA = 0.6745
MAX_Z_SCORE = 3.5

LINK = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
REFUSALS = (  # how a response begins, in lower case
    "as a language model",
    "as a large language model",
    "as an ai ",
    "i am not able to",
    "i am sorry, but",
    "i am unable to",
    "i apologize, but",
    "i can not ",
    "i can't ",
    "i cannot ",
    "i'm not able to",
    "i'm sorry, but",
    "i'm sorry, i ",
    "i'm unable to",
    "my apologies, but",
    "sorry, but i",
    "sorry, i ",
    "unfortunately, as an ai ",
    "unfortunately, i am unable",
    "unfortunately, i can't",
    "unfortunately, i cannot",
    "unfortunately, i'm unable",
)


def _gibberish(ppl: pl.Expr) -> pl.Expr:
    """Whether the log of a perplexity is an outlier above: a modified z-score over MAX_Z_SCORE."""
    above = ppl.log() - ppl.log().median()
    deviation = above.abs().median()
    return (above * MAD_TO_SIGMA > MAX_Z_SCORE * deviation) & (deviation > 0)


def _empty_or_link_only(response: str) -> bool:
    """Whether a response has no visible character, or links and no other letter or digit."""
    rest = LINK.sub("", response)
    if rest != response:
        return not any(map(str.isalnum, rest))
    return not any(character.isprintable() and not character.isspace() for character in response)


def _refusal(response: str) -> bool:
    return response.lstrip().casefold().replace("’", "'").startswith(REFUSALS)


SCORE_FLAGS: dict[str, tuple[str, Callable[[pl.Expr], pl.Expr]]] = {  # each with the measure that it tests
    "ifd_above_1": ("ifd", lambda ifd: ifd > 1),
    "gibberish": ("ppl_alone", _gibberish),
}
TEXT_FLAGS: dict[str, Callable[[str], bool]] = {"empty_or_link_only": _empty_or_link_only, "refusal": _refusal}
STORED = ("far_from_instruction", "near_duplicate")  # columns of RUN/flags.parquet
FLAGS = (*SCORE_FLAGS, *TEXT_FLAGS, *STORED)


def score_flags(scores: pl.DataFrame, names: Collection[str]) -> pl.DataFrame:
    """record_id, and the flags `names`, some of SCORE_FLAGS, as Boolean columns, from a score table.

    Raises ScorerError where the table has no value of the measure that a flag tests.
    """
    for name in names:
        column = SCORE_FLAGS[name][0]
        if column not in scores.columns or not scores[column].count():
            raise ScorerError(f"drop_flagged: {name} needs {column}, which has no value here: leave {name} out")
    flags = [SCORE_FLAGS[name][1](pl.col(SCORE_FLAGS[name][0]).fill_nan(None)).alias(name) for name in names]
    return scores.select("record_id", *flags).group_by("record_id").agg(pl.col(names).any()).sort("record_id")


def text_flags(records: Iterable[Record], names: Collection[str]) -> pl.DataFrame:
    """record_id, and the flags `names`, some of TEXT_FLAGS, as Boolean columns, from the responses of the records."""
    rows = []
    for record in records:
        responses = [t.response for t in record.turns if t.status in (RowStatus.OK, RowStatus.EMPTY_RESPONSE)]
        rows.append((record.record_id, *(any(map(TEXT_FLAGS[name], responses)) for name in names)))
    schema = {"record_id": pl.Int64} | dict.fromkeys(names, pl.Boolean)
    return pl.DataFrame(rows, schema=schema, orient="row")
