"""Flags for noise that a ranking lets through: the score table or the texts -> one Boolean column a flag.

A record bears a flag if any of its turns does; null is not known. It decides nothing: a selection drops what it is
told to. Flags that need embeddings are made elsewhere (STORED), and only named here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

import polars as pl

from scorer.types import Record, RowStatus, ScorerError

# The modified z-score of Iglewicz and Hoaglin (1993), and the limit that they advise.
MAD_TO_SIGMA = 0.6745
FAR_OUT = 3.5

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
    """Whether the log of a perplexity lies more than FAR_OUT robust deviations above the median."""
    above = ppl.log() - ppl.log().median()
    deviation = above.abs().median()
    return (above * MAD_TO_SIGMA > FAR_OUT * deviation) & (deviation > 0)


def _empty_or_link_only(response: str) -> bool:
    """Whether it has no character that shows, or links and no letter or digit beside them."""
    rest = LINK.sub("", response)
    if rest != response:
        return not any(map(str.isalnum, rest))
    return not any(character.isprintable() and not character.isspace() for character in response)


def _refusal(response: str) -> bool:
    return response.lstrip().casefold().replace("’", "'").startswith(REFUSALS)


SCORE_FLAGS: dict[str, tuple[str, Callable[[pl.Expr], pl.Expr]]] = {  # and the measure that each looks at
    "ifd_above_1": ("ifd", lambda ifd: ifd > 1),
    "gibberish": ("ppl_alone", _gibberish),
}
TEXT_FLAGS: dict[str, Callable[[str], bool]] = {"empty_or_link_only": _empty_or_link_only, "refusal": _refusal}
STORED = ("far_from_instruction", "near_duplicate")  # columns of RUN/flags.parquet
FLAGS = (*SCORE_FLAGS, *TEXT_FLAGS, *STORED)


def score_flags(scores: pl.DataFrame, names: Collection[str]) -> pl.DataFrame:
    """record_id, and those of SCORE_FLAGS as Boolean columns, from a score table.

    Raises ScorerError where the table has no value of the measure that a flag looks at.
    """
    for name in names:
        column = SCORE_FLAGS[name][0]
        if column not in scores.columns or not scores[column].count():
            raise ScorerError(f"drop_flagged: {name} needs {column}, which has no value here: leave {name} out")
    flags = [SCORE_FLAGS[name][1](pl.col(SCORE_FLAGS[name][0]).fill_nan(None)).alias(name) for name in names]
    return scores.select("record_id", *flags).group_by("record_id").agg(pl.col(names).any()).sort("record_id")


def text_flags(records: Iterable[Record], names: Collection[str]) -> pl.DataFrame:
    """record_id, and those of TEXT_FLAGS as Boolean columns, from the responses of the records."""
    rows = []
    for record in records:
        responses = [t.response for t in record.turns if t.status in (RowStatus.OK, RowStatus.EMPTY_RESPONSE)]
        rows.append((record.record_id, *(any(map(TEXT_FLAGS[name], responses)) for name in names)))
    schema = {"record_id": pl.Int64} | dict.fromkeys(names, pl.Boolean)
    return pl.DataFrame(rows, schema=schema, orient="row")
