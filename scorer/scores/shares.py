"""How many records are selected from each group: exact shares by largest remainder, or the papers' rounding.

Knows whole numbers only; neither tables nor scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from scorer.types import ScorerError

ROUNDINGS = ("exact", "paper")


def largest_remainder(total: int, sizes: Sequence[int]) -> list[int]:
    """Quotas in proportion to `sizes` (each >= 1) whose sum is exactly `total`.

    Each group gets the whole part of its share; the rest goes one each to the largest fractions, the first of equals.
    """
    whole = sum(sizes)
    shares = [divmod(total * size, whole) for size in sizes]
    quotas = [quota for quota, _ in shares]
    by_fraction = sorted(range(len(sizes)), key=lambda i: -shares[i][1])  # a stable sort
    for i in by_fraction[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


def exact_quotas(total: int, sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """Quotas of groups of `sizes` records that have only `room` to select from; their sum is min(total, sum(room)).

    A group with less room than its quota gives all of it, and the rest of `total` is divided again among the other
    groups, until every quota can be met.
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

    The first parts are the larger, so it is a ceiling (Small2Large, arXiv 2402.10430). What a group lacks is not made
    up by another.
    """
    parts = round(1 / share)
    return [-(-size // parts) for size in sizes]


def split_bounds(size: int, parts: int) -> list[int]:
    """The ends of the parts into which numpy.array_split cuts `size` items: nearly equal, the larger first."""
    each, more = divmod(size, parts)
    return [each * part + min(part, more) for part in range(1, parts + 1)]


def to_count(keep: int | Fraction, total: int) -> int:
    """How many of `total` records `keep` is: a share is rounded to the nearest number, halves up."""
    return keep if isinstance(keep, int) else math.floor(keep * total + Fraction(1, 2))


# The number of digits is limited, and exponents are refused: Fraction("1e999999999") would take all memory.
NUMBER = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?|\.[0-9]{1,18})(%?)")


def parse_keep(value: str | int | float | Fraction, option: str = "keep") -> int | Fraction:
    """A share of the records as an exact Fraction (0 < share <= 1), or a number of records as an int (>= 1).

    "10%", "0.1", 0.1 and Fraction(1, 10) are one share; "5000" and 5000 one number. A decimal point or a "%" makes a
    share: "100%", "1.0" and 1.0 are all records, "1" and 1 one record. Anything else raises ScorerError,
    which names `option`.
    """
    keep: object = value
    if isinstance(value, str) and (match := NUMBER.fullmatch(value.strip())):
        number, percent = match.groups()
        keep = Fraction(number) / 100 if percent else Fraction(number) if "." in number else int(number)
    elif isinstance(value, float) and math.isfinite(value):
        # The shortest decimal that reads back as this float is what was written; numpy's own repr is not a number.
        keep = Fraction(float.__repr__(value))
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
        return keep
    if isinstance(keep, Fraction) and 0 < keep <= 1:
        return keep
    raise ScorerError(
        f"{option}: {str(value)!r} is neither a share such as 10% (above 0%, at most 100%) nor a number of "
        "records such as 5000 (at least 1)"
    )
