"""The options of `scorer compare`. Knows names and limits only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from scorer.options import OTHER, SELECTION, check_fields, option, same_option
from scorer.scores.shares import parse_keep
from scorer.selection.config import SelectConfig
from scorer.types import ScorerError


@dataclass(frozen=True, slots=True)
class CompareConfig:
    """By which columns sources are compared, and how the intervals are drawn.

    by: a column, or one for each source; None is the run's own, or a table's only one. lowest: which end is better;
    None is the run's own end for its own column, the lowest of LP, and the highest of all else.
    """

    by: str | Sequence[str] | None = option(
        SELECTION,
        None,
        "Column to rank by, or one for each RUN.",
        unset="the protocol's, or the only one",
        metavar="COLUMN,...",
    )
    lowest: bool | None = same_option(SelectConfig, "lowest")
    at: str | Sequence[str | float | Fraction] = option(
        SELECTION, "1%,3%,5%,10%,15%", "Shares of the records to select and compare."
    )
    resamples: int = option(
        OTHER, 200, "Bootstrap resamples; at most 50 for Kendall's tau.", minimum=0, maximum=100_000
    )
    seed: int = option(OTHER, 42, "Seed for the bootstrap.", minimum=0)

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.shares  # parses `at`

    @property
    def shares(self) -> list[Fraction]:
        """`at`, parsed."""
        return [_share(value) for value in (self.at.split(",") if isinstance(self.at, str) else self.at)]


def _share(value: str | float | Fraction) -> Fraction:
    share = parse_keep(value, "at")
    if isinstance(share, int):
        raise ScorerError(f"at: {value!r} is a number of records; give shares such as 10%")
    return share
