"""Run directories -> one HTML page that opens offline: distributions, agreement, clusters, samples with their text.

Everything that comes from data or a manifest is escaped, and the page's own policy forbids scripts and requests.
Knows runs and pages; how a picture is drawn is scorer.report.plots'.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from scorer.agreement.compare import Pair, compare
from scorer.report import plots
from scorer.report.html import details, digits, figure, page, section, table
from scorer.report.samples import samples
from scorer.requirements import require
from scorer.runs.directory import Run
from scorer.runs.extras import clusters, has_clusters
from scorer.runs.manifest import Manifest
from scorer.scores.aggregate import per_record
from scorer.scores.measures import LEARNING
from scorer.scores.summary import QUANTILES, summarise
from scorer.selection.export import select
from scorer.selection.ranking import Selection
from scorer.storage.atomic import check_folder, check_writable, replacing
from scorer.storage.paths import absolute, is_remote, to_path
from scorer.types import ScorerError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AT = "1%,2%,3%,5%,7.5%,10%,15%,20%,30%,50%"
MEASURES = ("ifd", "ifd_loss", "ppl_conditioned", "ppl_alone", *LEARNING)
RESAMPLED = 100_000  # records up to which intervals are computed: of a million they take minutes
RESAMPLES = 100
LARGEST = 10  # clusters in the table
TAILS = "The outermost 0.1% at each end may not be drawn."
NAME = 24  # characters of a run's name that a picture has room for

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scored:
    """A run, what it is called on the page, its manifest, and its table of one row a record."""

    run: Run
    label: str
    manifest: Manifest
    scores: pl.DataFrame
    records: pl.DataFrame


class Pictures:
    """Draws for the page, and into `folder` where there is one."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def __call__(self, name: str, drawn: Figure, title: str, text: str) -> str:
        """The figure of a picture: its title, and what is to be known of it."""
        if self.folder is not None:
            plots.save(drawn, self.folder, name)
        return figure(plots.inline(drawn, name, escape(title)), title, text)


def report(
    runs: Sequence[Run | str | Path],
    output: str | Path,
    *,
    pictures_folder: str | Path | None = None,
    by: str | None = None,
    keep: str | float | int = "10%",
) -> Path:
    """Write the report of one or more finished runs of the same data to `output`, an .html file, and return its path.

    The first run is the one whose samples and clusters are shown, and that each further run is compared with.
    pictures_folder: write each picture there too, as PNG and SVG. by: the column to rank by; None is each run's own.
    keep: the share or number of records whose selection is shown.

    Raises ScorerError where a run is unfinished, where the runs do not hold the same records, and without matplotlib.
    """
    path = to_path(output)
    if not runs:
        raise ScorerError("report: name one run or more")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ScorerError(f"{path}: a report is a web page; name it .html")
    require("report")
    check_writable(path)
    if pictures_folder is not None and not is_remote(folder := to_path(pictures_folder)):
        check_folder(folder)
    with plots.style():
        selection = select(runs[0], keep=keep, by=by)
        paths = [run.path if isinstance(run, Run) else to_path(run) for run in runs]
        pairs = [_compare(paths[0], other, by) for other in paths[1:]]
        loaded = [_load(number, path, len(paths)) for number, path in enumerate(paths, 1)]
        first, draw = loaded[0], Pictures(None if pictures_folder is None else to_path(pictures_folder))
        column = by or str(first.manifest.ranking["by"])
        sections = [
            section("Runs", _runs(loaded)),
            section("Distributions", *_distributions(loaded, draw), *_length(first, column, draw)),
            section("Agreement", *_agreement(loaded, pairs, draw)) if pairs else "",
            section("Clusters", *_clusters(first, selection, keep, by, draw)) if has_clusters(first.run) else "",
            section("Samples", *samples(first.run, first.records, selection, column, keep, MEASURES)),
            section("Manifests", *(details(run.label, _json(run.manifest.to_dict())) for run in loaded)),
        ]
    summary = f"{first.records.height:,} records, ranked by {column}; {selection.kept.height:,} kept at {keep}"
    with replacing(path) as temporary:  # a lone surrogate, in a text or a path, is shown as its escape
        content = page(f"scorer: {', '.join(map(str, paths))}", summary, sections)
        temporary.write_bytes(content.encode("utf-8", "backslashreplace"))
    return path


def _load(number: int, path: Path, of: int) -> Scored:
    run = Run(path)
    scores = run.scores()
    name = Path(absolute(path)).name.encode("utf-8", "backslashreplace").decode()
    name = name if len(name) <= NAME else f"{name[:NAME]}…"
    return Scored(run, name if of == 1 else f"{number}: {name}", run.manifest, scores, per_record(scores))


def _compare(first: Path, other: Path, by: str | None) -> Pair:
    resamples = RESAMPLES if Run(first).manifest.records <= RESAMPLED else 0
    (pair,) = compare([first, other], by=by, at=AT, resamples=resamples)
    if not isinstance(pair, Pair):
        raise ScorerError(f"{other}: a report is made of run directories, not of selected files")
    return pair


def _runs(loaded: Sequence[Scored]) -> str:
    """What was run, how it went, and the quantiles."""
    heads = ["", *(run.label for run in loaded)]
    identities = [run.manifest.identity for run in loaded]
    rows: list[list[object]] = [["directory", *(run.run.path for run in loaded)]]
    rows.append(["model", *(run.manifest.model.get("name") for run in loaded)])
    for name in ("protocol", "engine", "dtype"):
        rows.append([name, *(i["config"].get(name) for i in identities)])
    rows.append(["ranked by", *(run.manifest.ranking["by"] for run in loaded)])
    rows.append(["records", *(f"{run.records.height:,}" for run in loaded)])
    summaries = [summarise(run.scores) for run in loaded]
    for status in sorted({status for s in summaries for status in s.status}):
        rows.append([f"rows {status}", *(f"{s.status.get(status, 0):,}" for s in summaries)])
    biases = [s.length_bias for s in summaries]
    rows.append(["Spearman of ifd with length", *("" if b is None else f"{b:+.3f}" for b in biases)])
    parts = [table(heads, [["" if cell is None else cell for cell in row] for row in rows if any(row[1:])])]
    for run, summary in zip(loaded, summaries, strict=True):
        quantiles = [[name, *map(digits, values)] for name, values in summary.quantiles.items()]
        parts.append(table([run.label, *(f"{q:.0%}" for q in QUANTILES)], quantiles))
    return "".join(parts)


def _distributions(loaded: Sequence[Scored], draw: Pictures) -> Iterable[str]:
    for name in MEASURES:
        series = {r.label: _finite(r.records, name)[0] for r in loaded if name in r.records.columns}
        series = {label: values for label, values in series.items() if len(values)}
        if series:
            mark = 1.0 if name in ("ifd", "ifd_loss") else None
            drawn = plots.distributions(series, name, log=_log(name, *series.values()), mark=mark)
            text = "Above 1 the prompt made the response less likely. " if mark else ""
            yield draw(name, drawn, f"Distribution of {name}", text + TAILS)
    for number, run in enumerate(loaded, 1):
        epochs = [name for name in run.records.columns if name.startswith("ppl_") and name[4:].isdigit()]
        series = {f"epoch {name[4:]}": _finite(run.records, name)[0] for name in epochs}
        if series and all(map(len, series.values())):
            drawn = plots.distributions(series, "ppl_conditioned", log=True)
            yield draw(
                f"epochs-{number}", drawn, f"Perplexity before training and after each epoch, {run.label}", TAILS
            )


def _length(first: Scored, by: str, draw: Pictures) -> Iterable[str]:
    length, value = _finite(first.records, "response_tokens", by)
    if len(value):
        log = (True, _log(by, value))
        drawn = plots.cloud(length, value, ("response tokens", by), log=log, medians=True)
        yield draw(
            "length", drawn, f"{by} against response length", f"{len(value):,} records of {first.label}. {TAILS}"
        )


def _agreement(loaded: Sequence[Scored], pairs: Sequence[Pair], draw: Pictures) -> Iterable[str]:
    curves = {}
    percents: list[float] = []
    for number, (other, pair) in enumerate(zip(loaded[1:], pairs, strict=True), 2):
        found = pair.agreement
        both = loaded[0].records.select("record_id", one=pair.by[0])
        both = both.join(other.records.select("record_id", two=pair.by[1]), on="record_id")
        x, y = _finite(both, "one", "two")
        if not len(x):
            continue
        names = (f"{pair.by[0]}, {loaded[0].label}", f"{pair.by[1]}, {other.label}")
        logs = (_log(pair.by[0], x), _log(pair.by[1], y))
        drawn = plots.cloud(x, y, names, log=logs, equal=pair.by[0] == pair.by[1] and logs[0] == logs[1])
        rank = f"Spearman {_figure(found.spearman.value)}, Kendall tau-b {_figure(found.kendall.value)}"
        text = f"{rank}; {found.records:,} records have both values, {found.left_out:,} have not."
        yield draw(f"against-{number}", drawn, f"{loaded[0].label} against {other.label}", text)
        cuts = [cut for cut in found.whole if cut.records]
        percents = [float(cut.share * 100) for cut in cuts]
        none = float("nan")
        for name, figures in (("overlap", [cut.overlap for cut in cuts]), ("IoU", [cut.iou for cut in cuts])):
            rows = [tuple(none if v is None else v for v in (f.value, f.low, f.high)) for f in figures]
            curves[f"{name} with {other.label}"] = rows
    if percents:
        title = "Agreement of the selections by percentage"
        drawn = plots.curves(percents, curves, ("records selected, %", "overlap, IoU"))  # type: ignore[arg-type]
        shaded = any(cut.iou.low is not None for pair in pairs for cut in pair.agreement.whole)
        text = "Shaded: 95% bootstrap intervals." if shaded else "Too many records for intervals here."
        yield draw("agreement", drawn, title, f"{text} Selections are of all records, with no limit on ifd.")


def _clusters(
    first: Scored, selection: Selection, keep: str | float | int, by: str | None, draw: Pictures
) -> Iterable[str]:
    inside = select(first.run, keep=keep, by=by, per_cluster=True)
    groups = clusters(first.run)
    kinds = {"taken by rank": selection, "taken per cluster": inside}
    counts = groups.group_by("group").agg(size=pl.len())
    for name, chosen in kinds.items():
        taken = chosen.kept.join(groups, on="record_id").group_by("group").agg(pl.len().alias(name))
        counts = counts.join(taken, on="group", how="left", nulls_equal=True)
    counts = counts.with_columns(pl.col(list(kinds)).fill_null(0)).sort(["size", "group"], descending=[True, False])
    drawn = plots.group_sizes(_floats(counts["size"]), {name: _floats(counts[name]) for name in kinds})
    without = int((counts["taken by rank"] == 0).sum())
    text = f"{counts.height:,} clusters; by rank, nothing is taken of {without:,} of them."
    yield draw("clusters", drawn, f"Clusters, and what {keep} takes of each", text)
    rows = [
        ["none" if group is None else group, *(f"{n:,}" for n in (size, *taken)), f"{taken[0] / size:.1%}"]
        for group, size, *taken in counts.head(LARGEST).iter_rows()
    ]
    yield table(["largest clusters", "records", *kinds, "share by rank"], rows)


def _finite(frame: pl.DataFrame, *names: str) -> list[Floats]:
    """The columns [n] each, of the rows in which all of them are finite."""
    values = [_floats(frame[name]) for name in names]
    whole = np.isfinite(values).all(axis=0)
    return [v[whole] for v in values]


def _floats(series: pl.Series) -> Floats:
    return series.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _log(name: str, *values: Floats) -> bool:
    """Whether a measure is drawn on a log scale: what is a ratio or an exponential."""
    return name not in LEARNING and all(bool((v > 0).all()) for v in values)


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
