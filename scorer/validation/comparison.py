"""What comes of comparing the fine-tuned models on held-out records: plain values, to JSON and back.

Knows no arrays; scorer.validation.statistics computes the values. NLLs are in nats, and low is good.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, is_dataclass
from types import NoneType
from typing import Any, Self, get_args, get_origin, get_type_hints

from scorer.agreement.statistics import Estimate

UNTRAINED = "untrained"  # the arm of the target as it was before training
BASELINE = "random"


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What an arm was trained on, and the NLL a token, in nats, that its models give the held-out records.

    records, tokens: how many records and response tokens each model was trained on, the mean over seeds; None for the
    untrained target. nll_per_token: the sum of all NLLs over the number of tokens, so that each token counts once; in
    the others each record counts once. mean_of_rows: of all records. ifd_weighted: each record counts as its ifd.
    hardest_third: of the records with the highest ifd. by: by kind of part (length, cluster, group) and its name.
    """

    arm: str
    records: float | None
    tokens: float | None
    nll_per_token: Estimate
    mean_of_rows: Estimate
    ifd_weighted: Estimate
    hardest_third: Estimate
    by: dict[str, dict[str, Estimate]]


@dataclass(frozen=True, slots=True)
class ArmPair:
    """A trained arm against another, on the same records and seeds.

    nll_per_token, mean_of_rows, hardest_third: those of `arm` minus those of `against`; below 0 `arm` is better.
    win_rate: the share of seeds and records in which the NLL of `arm` is the lower one; equal ones count half.
    win_rate_hardest: the same of the hardest third.
    """

    arm: str
    against: str
    nll_per_token: Estimate
    mean_of_rows: Estimate
    hardest_third: Estimate
    win_rate: Estimate
    win_rate_hardest: Estimate


@dataclass(frozen=True, slots=True)
class Verdicts:
    """How a judge found the answers of `arm` against those of `against`, counted in prompts and seeds.

    wins, ties, losses: what it said in both orders. disagreed: it said otherwise when it saw the answers in the other
    order. failed: pairs without a verdict, by the reason. winning_score: 1 + (wins - losses) / judged, where as in the
    papers a win and a tie are a win, a loss and a tie a loss; None where nothing was judged.
    """

    arm: str
    against: str
    wins: int
    ties: int
    losses: int
    disagreed: int
    failed: dict[str, int]
    winning_score: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The arms, and each trained arm against each other one.

    records: how many held-out records are compared. left_out: how many more lack a finite NLL from one of the models.
    seeds: how many models each arm has. sampled: what is drawn anew for the intervals, records and, where there are
    several, seeds; empty without intervals. sizes: how many records each part has, as in ArmResult.by. verdicts: of the
    judge, if there was one.
    """

    records: int
    left_out: int
    seeds: int
    sampled: tuple[str, ...]
    sizes: dict[str, dict[str, int]]
    arms: tuple[ArmResult, ...]
    pairs: tuple[ArmPair, ...]
    verdicts: tuple[Verdicts, ...] = ()

    @property
    def baseline(self) -> str | None:
        """The arm to compare the others with: random, or else the last one that is trained; None without two arms."""
        names = [pair.arm for pair in self.pairs]
        return BASELINE if BASELINE in names else names[-1] if names else None

    @property
    def against_baseline(self) -> list[ArmPair]:
        """The other trained arms against the baseline."""
        return [pair for pair in self.pairs if pair.against == self.baseline]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, all numbers finite."""
        return {name: [*value] if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """What `to_dict` gave. Raises ValueError where the values can't be that."""
        found: Self = _typed(cls, values)
        return found


def verdict(difference: Estimate) -> str:
    """A difference of NLLs in words: better, worse, or no difference seen, where its interval holds 0."""
    if difference.low is None or difference.high is None:
        return "not known without an interval"
    return "better" if difference.high < 0 else "worse" if difference.low > 0 else "no difference seen"


def _typed(kind: Any, value: Any) -> Any:
    """Plain JSON values as `kind`: a dataclass, a tuple or dict of one kind, text, or a finite number.

    Raises ValueError where they can't be that.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        if missing := hints.keys() - value.keys():
            raise ValueError(f"{kind.__name__} lacks {', '.join(sorted(missing))}")  # type: ignore[union-attr]
        return kind(**{name: _typed(hint, value[name]) for name, hint in hints.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(arguments[0], item) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], item) for key, item in value.items()}
    if NoneType in arguments:
        return None if value is None else _typed(arguments[0], value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{str(value)[:50]!r} is not {getattr(kind, '__name__', kind)}")
    return value
