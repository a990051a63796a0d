"""The options of `scorer select`, frozen and validated.

Knows names and limits only; neither tables nor files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from scorer.config import AGGREGATES, parse_names
from scorer.options import OUTPUT, SELECTION, check_fields, describe, option
from scorer.scores.shares import ROUNDINGS, parse_keep
from scorer.types import ScorerError

BUCKETS = ("low", "mid", "high")  # thirds of the values, ascending
ORDERS = ("input", "rank")
RESPONSES = ("chosen", "rejected", "margin", "reasoning", "answer")
AUTO = "auto"
FORM_NAMES = ("messages", "alpaca", "prompt-completion", "sharegpt")
Size = str | int | float | Fraction  # what parse_keep takes: "10%", 0.1, 5000


def parse_limit(text: str) -> float | str:
    """`0.9` as a number, `auto` as it is. Raises ValueError."""
    return text if text == AUTO else float(text)


@dataclass(frozen=True, slots=True)
class SelectConfig:
    """Which records to keep, and how they are written.

    by: a numeric column of the score table; None is ifd, or in `select` the protocol's.
    max_ifd: has no effect on a table without ifd (from a protocol with no alone view). "auto" is the limit of
        Superfiltering (arXiv 2402.00530), 1, where records are ranked by ifd, and no limit elsewhere; None is no limit.
    random: draw from all records that are JSON, scored or not, as the papers' baselines do; with `max_ifd` or
        `drop_flagged` from those that pass, with `bucket` from those that can be ranked.
    rounding: exact gives each group its share of `keep` by largest remainder, and passes on what a group can't fill;
        paper gives each ceil(its size / round(1 / share)), numpy.array_split's first part (arXiv 2402.10430).
    bucket: per group (arXiv 2402.10430); the first of uneven thirds is the larger.
    form: records that it can't hold are rejected as not_convertible; see scorer.selection.convert.
    diverse: keep `pool` records by rank first, and so many of those by diversity (Superfiltering.D, arXiv 2402.00530).
    """

    keep: Size | None = option(
        SELECTION,
        None,
        "Share (10%, 0.1; 100% or 1.0 is all) or number (5000) of records to keep.",
        unset="10%",
        metavar="SIZE",
    )
    by: str | None = option(SELECTION, None, "Column to rank by.", unset="the protocol's, mostly ifd", metavar="COLUMN")
    lowest: bool | None = option(
        SELECTION,
        None,
        "Which end of the ranking to keep.",
        unset="lowest for LP, else highest",
        flags="--lowest/--highest",
    )
    max_ifd: float | str | None = option(
        SELECTION,
        AUTO,
        "Drop records whose ifd is not below this; auto is 1 where they are ranked by ifd, else no limit.",
        metavar="NUMBER",
        parse=parse_limit,
    )
    random: bool = option(SELECTION, False, "Draw from all records at random, instead of ranking.")
    seed: int = option(SELECTION, 42, "Seed for --random.", minimum=0)
    aggregate: str = option(SELECTION, "mean", "How the turns of a conversation become one value.", choices=AGGREGATES)
    response: str | None = option(
        SELECTION,
        None,
        "Which responses of a record count, where it has several; margin is chosen less rejected.",
        unset="all but rejected",
        choices=RESPONSES,
    )
    per: str | None = option(
        SELECTION, None, "Give each value of this column of the data a quota.", unset="none", metavar="COLUMN"
    )
    per_cluster: bool = option(SELECTION, False, "Give each cluster a quota.")
    rounding: str = option(
        SELECTION,
        "exact",
        "How quotas are rounded: to exact totals, or each up as in the paper's code.",
        choices=ROUNDINGS,
    )
    bucket: str | None = option(
        SELECTION, None, "Keep only this third of the values (per group).", unset="all", choices=BUCKETS
    )
    diverse: Size | None = option(
        SELECTION, None, "Keep this many by facility location, instead of --keep.", metavar="SIZE"
    )
    pool: Size | None = option(
        SELECTION,
        None,
        "How many of the best records --diverse chooses from.",
        unset="20%",
        flags="--from",
        metavar="SIZE",
    )
    drop_flagged: tuple[str, ...] = option(
        SELECTION,
        (),
        "Drop records flagged ifd_above_1, gibberish, empty_or_link_only, refusal, far_from_instruction or "
        "near_duplicate.",
        unset="none",
        metavar="NAME,...",
        parse=parse_names,
    )
    form: str | None = option(
        OUTPUT,
        None,
        "Convert the kept records to this form; other columns of the data are left out.",
        unset="as they came",
        flags="--as",
        choices=FORM_NAMES,
    )
    dataset_info: bool = option(
        OUTPUT, False, "Describe the output, given --as, in LLaMA-Factory's dataset_info.json beside it."
    )
    order: str = option(OUTPUT, "input", "Order of the kept records.", choices=ORDERS)
    with_scores: bool = option(OUTPUT, False, "Add each record's scores, under the key 'scorer'.")
    rejected: str | Path | None = option(
        OUTPUT,
        None,
        "Write all other records to FILE, with the reason under the key 'scorer'.",
        unset="not written",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        if self.diverse is None and self.pool is not None:
            raise ScorerError("pool: --from says what --diverse chooses from; give --diverse too")
        if self.diverse is not None and self.keep is not None:
            raise ScorerError("keep: --diverse says how many are kept, and --from of how many; leave --keep out")
        check_fields(self)
        if self.dataset_info and self.form is None:
            raise ScorerError("dataset_info: it describes one of the forms of --as; give --as too")
        if self.per is not None and self.per_cluster:
            raise ScorerError("per: records are grouped by a column or by cluster, not by both")
        first, _ = self.by_rank, self.size  # parses both, so that an invalid one raises here
        if self.rounding == "paper" and not isinstance(first, Fraction):
            raise ScorerError(f"rounding: the paper's needs a share such as 10%, not a number of records ({first})")
        if not isinstance(self.drop_flagged, tuple | list):
            raise ScorerError(f"drop_flagged: {self.drop_flagged!r} is not a tuple of names")
        limit = self.max_ifd
        if limit not in (None, AUTO) and (
            not isinstance(limit, int | float) or isinstance(limit, bool) or not 0 < limit < math.inf
        ):
            raise ScorerError(f"max_ifd: {limit!r} is not a number above 0 (or None, for no limit)")

    @property
    def column(self) -> str:
        """The column to rank by."""
        return self.by or "ifd"

    @property
    def limit(self) -> float | None:
        """The ifd that a record has to lie below; None for no limit."""
        if isinstance(self.max_ifd, str):
            by_ifd = self.column == "ifd" and self.response != "margin"
            return 1.0 if by_ifd and not self.random else None
        return self.max_ifd

    @property
    def size(self) -> int | Fraction:
        """How many records are kept."""
        if self.diverse is not None:
            return parse_keep(self.diverse, "diverse")
        return parse_keep("10%" if self.keep is None else self.keep)

    @property
    def by_rank(self) -> int | Fraction:
        """How many records are kept by rank, before diversity."""
        return self.size if self.diverse is None else parse_keep("20%" if self.pool is None else self.pool, "pool")


# The options that say which records are chosen by their scores.
CHOICES = tuple(
    f.name for f, _, info in describe(SelectConfig) if info.group == SELECTION and f.name not in ("random", "seed")
)
