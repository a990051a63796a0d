"""A comparison of fine-tuned models as tables of text and as sentences, for the console and for the page.

Knows text only. The console's tables have fewer figures and intervals than the page's: they fit 80 to 100 columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scorer.agreement.statistics import Estimate
from scorer.validation.comparison import Comparison, Verdicts, verdict

LARGEST = 10  # clusters, and groups, that are shown


@dataclass(frozen=True, slots=True)
class TextTable:
    """The first column names the rows."""

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(found: Comparison, *, full: bool) -> list[TextTable]:
    """The arms, those against the baseline, the judge's verdicts, and parts of the records, as far as there are any.

    full: with all figures and intervals, and by cluster and group.
    """
    result = [_arms(found, full)]
    if "length" in found.sizes:
        result.append(_parts(found, "length", full))
    if found.pairs:
        result.append(_against(found, full))
    if found.verdicts:
        result.append(_judged(found.verdicts))
    if full:
        result += [_parts(found, kind, full) for kind in found.sizes if kind != "length"]
    return result


def sentences(found: Comparison) -> Iterator[str]:
    """What the differences to the baseline say, and what the intervals are worth."""
    if not found.sampled:
        yield "without resamples there are no intervals, which would tell a difference from chance"
    for pair in found.against_baseline if found.sampled else ():
        rows, tokens = verdict(pair.mean_of_rows), verdict(pair.nll_per_token)
        contradict = {rows, tokens} == {"better", "worse"}
        why = ": in the one each record counts once, in the other each token" if contradict else ""
        yield f"{pair.arm} against {pair.against}: {rows} by the mean of rows, {tokens} by NLL a token{why}"
    if found.sampled:
        alone = "" if "seeds" in found.sampled else " alone: one seed does not show how much training varies"
        yield f"the intervals are 95%, over {' and '.join(found.sampled)}{alone}"
    if found.left_out:
        yield f"{found.left_out:,} more records have no finite NLL from every model, and are left out"


def _arms(found: Comparison, full: bool) -> TextTable:
    header = ["arm", "trained on records", "trained on tokens", "NLL a token", "mean of rows", "hardest third"]
    rows = []
    for arm in found.arms:
        figures = [arm.nll_per_token, arm.mean_of_rows, arm.hardest_third, *([arm.ifd_weighted] if full else [])]
        trained = ["none" if count is None else f"{count:,.0f}" for count in (arm.records, arm.tokens)]
        rows.append([arm.arm, *trained, *(_text(figure, ".4f", interval=full) for figure in figures)])
    title = f"NLL a token of {found.records:,} held-out records, in nats: low is good"
    return TextTable(title, [*header, "weighted by ifd"] if full else header, rows)


def _against(found: Comparison, full: bool) -> TextTable:
    header = ["arm", "NLL a token", "mean of rows", "win rate", *(["hardest third", "win rate in it"] if full else [])]
    rows = []
    for pair in found.against_baseline:
        row = [pair.arm, _text(pair.nll_per_token, "+.4f"), _text(pair.mean_of_rows, "+.4f"), _rate(pair.win_rate)]
        hardest = [_text(pair.hardest_third, "+.4f"), _rate(pair.win_rate_hardest)]
        rows.append(row + hardest if full else row)
    return TextTable(f"against {found.baseline}: below 0, or more than half the wins, is better", header, rows)


def _judged(verdicts: Sequence[Verdicts]) -> TextTable:
    header = ["arm", "against", "wins", "ties", "losses", "disagreed", "failed", "winning score"]
    rows = []
    for of in verdicts:
        why = ", ".join(f"{count:,} {reason}" for reason, count in of.failed.items() if count)
        counts = [f"{count:,}" for count in (of.wins, of.ties, of.losses, of.disagreed)]
        rows.append([of.arm, of.against, *counts, why or "0", _text(Estimate(of.winning_score), ".3f")])
    return TextTable("answers to held-out prompts, judged", header, rows)


def _parts(found: Comparison, kind: str, full: bool) -> TextTable:
    sizes = found.sizes[kind]
    rows = [
        [part, f"{sizes[part]:,}", *(_text(arm.by[kind][part], ".4f", interval=full) for arm in found.arms)]
        for part in [*sizes][:LARGEST]
    ]
    largest = f": the {LARGEST} largest of {len(sizes):,}" if len(sizes) > LARGEST else ""
    return TextTable(f"mean of rows by {kind}{largest}", [kind, "records", *(arm.arm for arm in found.arms)], rows)


def _text(of: Estimate, digits: str, *, interval: bool = True) -> str:
    """The value and, where there is one, its interval; digits: a format specification."""
    if of.value is None:
        return "none"
    shown = interval and of.low is not None and of.high is not None
    return f"{of.value:{digits}} ({of.low:{digits}} to {of.high:{digits}})" if shown else f"{of.value:{digits}}"


def _rate(of: Estimate) -> str:
    values = (None if value is None else 100 * value for value in (of.value, of.low, of.high))
    return _text(Estimate(*values), ".1f").replace(" ", "% ", 1) if of.low is not None else _text(of, ".1%")
