"""How many records each group may give: exact shares by largest remainder, or the papers' rounding.

Whole numbers only: it knows neither tables nor scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from scorer.types import ScorerError

ROUNDINGS = ("exact", "paper")


def largest_remainder(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` dealt out in proportion to `sizes` (each >= 1), exactly: the sum of what is given back is `total`.

    Everyone gets the whole part of their share; what is left goes one each to the largest fractions, and of equal
    fractions to the first.
    """
    whole = sum(sizes)
    shares = [divmod(total * size, whole) for size in sizes]
    quotas = [quota for quota, _ in shares]
    by_fraction = sorted(range(len(sizes)), key=lambda i: -shares[i][1])  # a stable sort
    for i in by_fraction[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


def exact_quotas(total: int, sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """Quotas of groups of `sizes` records, of which only `room` can be taken; their sum is min(total, sum(room)).

    A group with less room than its quota gives all that it has, and the rest of `total` is dealt out anew among the
    other groups, until every quota can be met.
    """
    quotas = list(room)
    left = min(total, sum(room))
    open_groups = list(range(len(sizes)))
    while open_groups:
        dealt = dict(zip(open_groups, largest_remainder(left, [sizes[i] for i in open_groups]), strict=True))
        short = {i for i in open_groups if dealt[i] > room[i]}
        if not short:
            for i, quota in dealt.items():
                quotas[i] = quota
            break
        left -= sum(room[i] for i in short)
        open_groups = [i for i in open_groups if i not in short]
    return quotas


def paper_quotas(share: Fraction, sizes: Sequence[int]) -> list[int]:
    """The size of the first part of each group when numpy.array_split cuts it into round(1 / share) parts.

    The first parts are the larger, so it is a ceiling (Small2Large, arXiv 2402.10430). Nothing passes from one group
    to another.
    """
    parts = round(1 / share)
    return [-(-size // parts) for size in sizes]


def split_bounds(size: int, parts: int) -> list[int]:
    """Where the parts end that numpy.array_split makes of `size` things: as equal as can be, the larger first."""
    each, more = divmod(size, parts)
    return [each * part + min(part, more) for part in range(1, parts + 1)]


# Digits are bounded, and exponents refused: Fraction("1e999999999") would take all memory.
NUMBER = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?|\.[0-9]{1,18})(%?)")


def parse_keep(value: str | int | float | Fraction) -> int | Fraction:
    """A share of the records as an exact Fraction (0 < share <= 1), or a number of records as an int (>= 1).

    "10%", "0.1", 0.1 and Fraction(1, 10) are one share; "5000" and 5000 one number. A decimal without "%" lies below 1,
    since 1.0 might mean one record or all of them. Anything else raises ScorerError.
    """
    keep: object = value
    if isinstance(value, str) and (match := NUMBER.fullmatch(value.strip())):
        number, percent = match.groups()
        if percent:
            keep = Fraction(number) / 100
        elif "." in number:
            keep = _below_one(Fraction(number))
        else:
            keep = int(number)
    elif isinstance(value, float) and math.isfinite(value):
        # The shortest decimal that reads back as this float is what was written; numpy's own repr is not a number.
        keep = _below_one(Fraction(float.__repr__(value)))
    return _checked_keep(keep, value)


def _below_one(share: Fraction) -> Fraction | None:
    return share if share < 1 else None


def _checked_keep(keep: object, shown: object) -> int | Fraction:
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
        return keep
    if isinstance(keep, Fraction) and 0 < keep <= 1:
        return keep
    raise ScorerError(
        f"keep: {str(shown)!r} is neither a share such as 10% (above 0%, at most 100%) nor a number of "
        "records such as 5000 (at least 1)"
    )
