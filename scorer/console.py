"""What the command line shows: progress, the summary of a run, the outcome of a selection, comparisons, models.

The results of `compare`, `validate` and `models` go to standard output; progress, summaries and messages go to standard
error. Knows rich; computes nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial

from rich.box import HEAVY_HEAD, Box
from rich.console import Console
from rich.table import Column, Table

from scorer.agreement.compare import Contents, Pair
from scorer.agreement.statistics import Estimate
from scorer.models.find import ModelRow
from scorer.runs.directory import Run
from scorer.runs.progress import PlainConsole, console
from scorer.scores.summary import QUANTILES
from scorer.selection.selection import Selection
from scorer.types import ScorerError
from scorer.validation.comparison import Comparison
from scorer.validation.tables import sentences, tables

line = partial(console.print, soft_wrap=True)  # prints a line that stays one, however long
PIPE_WIDTH = 10_000  # columns


def _standard_output() -> Console:
    """Standard output; where it is not a terminal, wide enough that nothing is cut or wrapped.

    Raises ScorerError if it is closed.
    """
    if sys.stdout is None:
        raise ScorerError("standard output is closed: give it a file, or a program to read it")
    return PlainConsole() if sys.stdout.isatty() else PlainConsole(width=PIPE_WIDTH)


def _box(output: Console) -> Box | None:
    return HEAVY_HEAD if output.is_terminal else None


def show_run(run: Run) -> None:
    """The summary of a finished run."""
    manifest = run.manifest
    summary = run.summary()
    rows = sum(summary.status.values())
    table = Table(title=f"{run.path}: {manifest.records:,} records, {rows:,} rows", title_justify="left")
    table.add_column("")
    for quantile in QUANTILES:
        table.add_column(f"{quantile:.0%}", justify="right")
    for name, values in summary.quantiles.items():
        table.add_row(name, *(f"{v:,.0f}" if name.endswith("tokens") else f"{v:,.4g}" for v in values))
    console.print(table)
    line("status: " + ", ".join(f"{count:,} {status}" for status, count in summary.status.items()))
    if not summary.quantiles:
        line("no response could be scored: the status of each row says why, and docs/measures.md what it means")
    if manifest.formats:
        line("format: " + ", ".join(f"{count:,} {name}" for name, count in manifest.formats.items()))
    if manifest.left_out:
        line("left out: " + ", ".join(f"{name} of {count:,} records" for name, count in manifest.left_out.items()))
    if manifest.special_tokens:
        how = "as text" if manifest.config.get("split_special_tokens") else "as tokens; see --split-special-tokens"
        line(f"special tokens in the text of {manifest.special_tokens:,} records: read {how}")
    if summary.length_bias is not None:
        line(f"Spearman of ifd with response length: {summary.length_bias:+.3f}")
    if manifest.seconds:
        rate = manifest.tokens / manifest.seconds
        line(f"{manifest.tokens:,} tokens in {manifest.seconds:,.1f} s: {rate:,.0f} tokens/s")


def show_selection(selection: Selection, output: str) -> None:
    """How many were kept, and why the others were not."""
    kept = selection.kept.height
    if selection.drawn_from is None:
        line(f"kept {kept:,} of {selection.total:,} records: {output}")
    else:
        line(f"drew {kept:,} at random from {selection.drawn_from:,} of {selection.total:,} records: {output}")
    reasons = Counter(selection.rejected["reason"].to_list())
    if reasons:
        line("dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()))
    for sentence in selection.unchecked:
        line(f"not checked: {sentence}")
    if kept + reasons["not_convertible"] < selection.requested:
        chosen = "ranked" if selection.drawn_from is None else "drawn"
        line(f"{selection.requested:,} were asked for; no more could be {chosen}")


def show_comparison(rows: Sequence[Pair] | Sequence[Contents]) -> None:
    """A table per pair of sources, on standard output."""
    output = _standard_output()
    line = partial(output.print, soft_wrap=True)
    for row in rows:
        if isinstance(row, Contents):
            iou = "none" if row.iou is None else f"{row.iou:.3f}"
            line(f"{row.first} ({row.records[0]:,} records), {row.second} ({row.records[1]:,} records)")
            line(f"{row.shared:,} in both; intersection over union {iou}")
            continue
        found = row.agreement
        ends = [f"{by} ({'lowest' if low else 'highest'})" for by, low in zip(row.by, row.lowest, strict=True)]
        line(f"{row.first} by {ends[0]}, {row.second} by {ends[1]}: {found.records:,} records")
        if found.left_out:
            line(f"{found.left_out:,} more have no finite value from both, and are left out")
        table = Table("", *(Column(title, justify="right") for title in ("value", "95% interval")), box=_box(output))
        table.add_row("Spearman", *_cells(found.spearman))
        table.add_row("Kendall tau-b", *_cells(found.kendall))
        for where, cuts in (("", found.whole), (" per cluster", found.per_cluster or ())):
            for cut in cuts:
                name = f"best {100 * float(cut.share):.4g}%{where}, {cut.records:,}"
                table.add_row(f"{name}: overlap", *_cells(cut.overlap))
                table.add_row(f"{name}: IoU", *_cells(cut.iou))
        output.print(table)


def _cells(found: Estimate) -> tuple[str, str]:
    value = "none" if found.value is None else f"{found.value:.3f}"
    return value, "" if found.low is None or found.high is None else f"{found.low:.3f} to {found.high:.3f}"


def show_validation(comparison: Comparison) -> None:
    """The fine-tuned models side by side, against the baseline, and as judged, on standard output."""
    output = _standard_output()
    for found in tables(comparison, full=False):
        first, *others = found.header
        columns = [Column(first), *(Column(name, justify="right") for name in others)]
        for column in columns:
            column.overflow = "fold"  # a number that is cut would be another one
        table = Table(*columns, title=found.title, title_justify="left", box=_box(output))
        for row in found.rows:
            table.add_row(*row)
        output.print(table)
    for sentence in sentences(comparison):
        output.print(sentence, soft_wrap=True)


def show_models(rows: Sequence[ModelRow]) -> None:
    """The table of known models, on standard output."""
    output = _standard_output()
    table = Table(*(Column(title, overflow="fold") for title in ("name", "from", "what", "on disk")), box=_box(output))
    for row in rows:
        table.add_row(row.name, row.origin, row.what, f"{row.megabytes:,.0f} MB  {row.path}" if row.path else "no")
    output.print(table)
    line("Any other Hugging Face name or local folder works too.")
