"""Run directories -> one HTML page that opens offline: distributions, agreement, clusters, samples with their text.

Computes what the page shows; report.html.jinja lays it out and escapes it, scorer.reporting.plots draws the pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined

from scorer.agreement.compare import Pair, compare
from scorer.reporting import plots
from scorer.reporting.samples import digits, samples
from scorer.reporting.validation import Validation
from scorer.reporting.validation import read as read_validation
from scorer.requirements import require
from scorer.runs.directory import Run
from scorer.runs.extras import clusters, has_clusters
from scorer.runs.manifest import Manifest
from scorer.scores.aggregate import per_record
from scorer.scores.measures import LEARNING
from scorer.scores.summary import QUANTILES, Summary, summarise
from scorer.selection.config import SelectConfig
from scorer.selection.export import select
from scorer.selection.selection import Selection
from scorer.storage.atomic import check_folder, replacing
from scorer.storage.outputs import check_outside_runs, check_writable
from scorer.storage.paths import absolute, is_remote, to_path
from scorer.types import ScorerError

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

SHARES = "1%,2%,3%,5%,7.5%,10%,15%,20%,30%,50%"
MEASURES = ("ifd", "ifd_loss", "ppl_conditioned", "ppl_alone", *LEARNING)
MAX_RESAMPLED_RECORDS = 100_000  # with intervals; those of a million records take minutes
RESAMPLES = 100
CLUSTER_ROWS = 10  # of the table, largest clusters first
TAILS_NOTE = "The outermost 0.1% at each end may not be drawn."

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A run, its label on the page, its manifest, its score table, and its table of one row a record."""

    run: Run
    label: str
    manifest: Manifest
    scores: pl.DataFrame
    records: pl.DataFrame


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture with its title and a note; `svg` is markup. `name` is unique on the page."""

    name: str
    title: str
    note: str
    svg: str


@dataclass(frozen=True, slots=True)
class Table:
    """The first column names the rows."""

    header: list[object]
    rows: list[list[object]]


@dataclass(frozen=True, slots=True)
class Draw:
    """Makes the figures of a page, and saves each picture in `folder` where there is one."""

    folder: Path | None

    def __call__(self, name: str, picture: Picture, title: str, note: str) -> Figure:
        if self.folder is not None:
            plots.save(picture, self.folder, name)
        return Figure(name, title, note, plots.inline(picture, name))


def report(
    runs: Sequence[Run | str | Path],
    output: str | Path,
    *,
    validation: str | Path | None = None,
    pictures_folder: str | Path | None = None,
    by: str | None = None,
    keep: str | float | int = "10%",
) -> Path:
    """Write the report of one or more finished runs of the same data to `output`, an .html file, and return its path.

    The page shows samples and clusters of the first run, and compares it with each further run. validation: the folder
    of a finished validation, whose results the page shows. pictures_folder: write each picture there too, as PNG and
    SVG. by: the column to rank by; None is each run's own. keep: the share or number of records whose selection is
    shown.

    Raises ScorerError where a run or the validation is unfinished, where the runs do not hold the same records, and
    without matplotlib.
    """
    path = to_path(output)
    if not runs or isinstance(runs, str | Path | Run):
        raise ScorerError("report: give a list of one run or more")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ScorerError(f"{path}: a report is a web page; name it .html")
    require("report")
    SelectConfig(keep=keep, by=by)  # checks them
    check_writable(path)
    folder = None if pictures_folder is None else to_path(pictures_folder)
    if folder is not None:
        check_outside_runs(folder)
        if not is_remote(folder):
            check_folder(folder)
    paths = [run.path if isinstance(run, Run) else to_path(run) for run in runs]
    validated = None if validation is None else read_validation(to_path(validation), Run(paths[0]))
    draw = Draw(folder)
    with plots.style():
        page = _page(paths, draw, by, keep) | _validation(validated, draw)
    environment = Environment(
        loader=PackageLoader("scorer", "reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    text = environment.get_template("report.html.jinja").render(page)
    with replacing(path) as temporary:  # a lone surrogate in a text or a path is shown as its escape
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    return path


def _page(paths: Sequence[Path], draw: Draw, by: str | None, keep: str | float | int) -> dict[str, Any]:
    """The variables of report.html.jinja."""
    selection = select(paths[0], keep=keep, by=by)
    pairs = [_compare(paths[0], other, by) for other in paths[1:]]
    loaded = [_load(number, path, len(paths)) for number, path in enumerate(paths, 1)]
    first = loaded[0]
    column = by or str(first.manifest.ranking["by"])
    shown, fault = samples(first.run, first.records, selection, column, keep, MEASURES)
    return {
        "title": f"scorer: {', '.join(map(str, paths))}",
        "summary": f"{first.records.height:,} records, ranked by {column}; {selection.kept.height:,} kept at {keep}",
        "run_tables": _run_tables(loaded),
        "figures": {
            "Distributions": [*_distributions(loaded, draw), *_length(first, column, draw)],
            "Agreement": list(_agreement(loaded, pairs, draw)),
        },
        "clusters": _clusters(first, selection, keep, by, draw) if has_clusters(first.run) else None,
        "samples": shown,
        "fault": fault,
        "manifests": [(run.label, json.dumps(run.manifest.to_dict(), indent=2, ensure_ascii=False)) for run in loaded],
    }


def _load(number: int, path: Path, count: int) -> LoadedRun:
    run = Run(path)
    scores = run.scores()
    name = Path(absolute(path)).name.encode("utf-8", "backslashreplace").decode()
    label = plots.shortened(name)
    return LoadedRun(run, label if count == 1 else f"{number}: {label}", run.manifest, scores, per_record(scores))


def _compare(first: Path, other: Path, by: str | None) -> Pair:
    resamples = RESAMPLES if Run(first).manifest.records <= MAX_RESAMPLED_RECORDS else 0
    (pair,) = compare([first, other], by=by, at=SHARES, resamples=resamples)
    if not isinstance(pair, Pair):
        raise ScorerError(f"{other}: it holds selected records; a report is made of run directories")
    return pair


def _run_tables(loaded: Sequence[LoadedRun]) -> list[Table]:
    """A table of what was run and how it went, and a table of each run's quantiles."""
    summaries = [summarise(run.scores) for run in loaded]
    statuses = sorted({status for summary in summaries for status in summary.status})
    facts = [_facts(run, summary, statuses) for run, summary in zip(loaded, summaries, strict=True)]
    rows = [[name, *("" if of[name] is None else of[name] for of in facts)] for name in facts[0]]
    tables = [Table(["", *(run.label for run in loaded)], [row for row in rows if any(row[1:])])]
    for run, summary in zip(loaded, summaries, strict=True):
        quantiles: list[list[object]] = [[name, *map(digits, values)] for name, values in summary.quantiles.items()]
        tables.append(Table([run.label, *(f"{q:.0%}" for q in QUANTILES)], quantiles))
    return tables


def _facts(run: LoadedRun, summary: Summary, statuses: Sequence[str]) -> dict[str, object]:
    manifest, bias = run.manifest, summary.length_bias
    return {
        "directory": run.run.path,
        "model": manifest.model.get("name"),
        **{name: manifest.identity["config"].get(name) for name in ("protocol", "engine", "dtype")},
        "ranked by": manifest.ranking["by"],
        "records": f"{run.records.height:,}",
        **{f"rows {status}": f"{summary.status.get(status, 0):,}" for status in statuses},
        "Spearman of ifd with length": None if bias is None else f"{bias:+.3f}",
    }


def _distributions(loaded: Sequence[LoadedRun], draw: Draw) -> Iterator[Figure]:
    for name in MEASURES:
        series = {r.label: _finite(r.records, name)[0] for r in loaded if name in r.records.columns}
        series = {label: values for label, values in series.items() if len(values)}
        if series:
            mark = 1.0 if name in ("ifd", "ifd_loss") else None
            picture = plots.distributions(series, name, log=_is_log(name, *series.values()), mark=mark)
            note = "Above 1 the prompt made the response less likely. " if mark else ""
            yield draw(name, picture, f"Distribution of {name}", note + TAILS_NOTE)
    for number, run in enumerate(loaded, 1):
        epochs = [name for name in run.records.columns if name.startswith("ppl_") and name[4:].isdigit()]
        series = {f"epoch {name[4:]}": _finite(run.records, name)[0] for name in epochs}
        if series and all(map(len, series.values())):
            picture = plots.distributions(series, "ppl_conditioned", log=True)
            title = f"Perplexity before training and after each epoch, {run.label}"
            yield draw(f"epochs-{number}", picture, title, TAILS_NOTE)


def _length(first: LoadedRun, by: str, draw: Draw) -> Iterator[Figure]:
    length, value = _finite(first.records, "response_tokens", by)
    if len(value):
        log = (True, _is_log(by, value))
        picture = plots.cloud(length, value, ("response tokens", by), log=log, medians=True)
        note = f"{len(value):,} records of {first.label}. {TAILS_NOTE}"
        yield draw("length", picture, f"{by} against response length", note)


def _agreement(loaded: Sequence[LoadedRun], pairs: Sequence[Pair], draw: Draw) -> Iterator[Figure]:
    curves: dict[str, list[plots.Interval]] = {}
    percents: list[float] = []
    for number, (other, pair) in enumerate(zip(loaded[1:], pairs, strict=True), 2):
        found = pair.agreement
        both = loaded[0].records.select("record_id", one=pair.by[0])
        both = both.join(other.records.select("record_id", two=pair.by[1]), on="record_id")
        x, y = _finite(both, "one", "two")
        if not len(x):
            continue
        names = (f"{pair.by[0]}, {loaded[0].label}", f"{pair.by[1]}, {other.label}")
        logs = (_is_log(pair.by[0], x), _is_log(pair.by[1], y))
        picture = plots.cloud(x, y, names, log=logs, equal=pair.by[0] == pair.by[1] and logs[0] == logs[1])
        spearman, kendall = ("none" if s.value is None else f"{s.value:.3f}" for s in (found.spearman, found.kendall))
        note = (
            f"Spearman {spearman}, Kendall tau-b {kendall}; {found.records:,} records have both values, "
            f"{found.left_out:,} have not."
        )
        yield draw(f"against-{number}", picture, f"{loaded[0].label} against {other.label}", note)
        shares = [share for share in found.whole if share.records]
        percents = [float(share.share * 100) for share in shares]
        for name, statistics in (("overlap", [s.overlap for s in shares]), ("IoU", [s.iou for s in shares])):
            curves[f"{name} with {other.label}"] = [astuple(s) for s in statistics]
    if percents:
        picture = plots.curves(percents, curves, ("records selected, %", "overlap, IoU"))
        shaded = any(share.iou.low is not None for pair in pairs for share in pair.agreement.whole)
        note = "Shaded: 95% bootstrap intervals." if shaded else "Too many records for intervals here."
        note += " Selections are of all records, with no limit on ifd."
        yield draw("agreement", picture, "Agreement of the selections by percentage", note)


def _validation(found: Validation | None, draw: Draw) -> dict[str, Any]:
    """What was validated, and the picture of the arms against the baseline where there are several."""
    if found is None or not found.differences:
        return {"validation": found, "difference": None}
    rows = {arm: astuple(difference) for arm, difference in found.differences.items()}
    picture = plots.intervals(rows, "difference of the mean of rows, nats")
    title = f"NLL a token of held-out records, against {found.baseline}"
    note = "Below 0 the arm is better. Lines: 95% bootstrap intervals."
    return {"validation": found, "difference": draw("validation", picture, title, note)}


def _clusters(
    first: LoadedRun, selection: Selection, keep: str | float | int, by: str | None, draw: Draw
) -> dict[str, Figure | Table]:
    selections = {
        "taken by rank": selection,
        "taken per cluster": select(first.run, keep=keep, by=by, per_cluster=True),
    }
    groups = clusters(first.run)
    counts = groups.group_by("group").agg(size=pl.len())
    for name, chosen in selections.items():
        taken = chosen.kept.join(groups, on="record_id").group_by("group").agg(pl.len().alias(name))
        counts = counts.join(taken, on="group", how="left", nulls_equal=True)
    counts = counts.with_columns(pl.col(list(selections)).fill_null(0))
    counts = counts.sort(["size", "group"], descending=[True, False])
    sizes, *taken_counts = (counts[name].cast(pl.Float64).to_numpy() for name in ("size", *selections))
    picture = plots.group_sizes(sizes, dict(zip(selections, taken_counts, strict=True)))
    without = int((counts["taken by rank"] == 0).sum())
    note = f"{counts.height:,} clusters; by rank, nothing is taken of {without:,} of them."
    rows = [
        ["none" if group is None else group, *(f"{n:,}" for n in (size, *taken)), f"{taken[0] / size:.1%}"]
        for group, size, *taken in counts.head(CLUSTER_ROWS).iter_rows()
    ]
    return {
        "figure": draw("clusters", picture, f"Clusters, and what {keep} takes of each", note),
        "table": Table(["largest clusters", "records", *selections, "share by rank"], rows),
    }


def _finite(frame: pl.DataFrame, *names: str) -> list[Floats]:
    """The columns [n] each, of the rows in which all of them are finite."""
    columns = frame.select(pl.col(*dict.fromkeys(names)).cast(pl.Float64))
    finite = columns.filter(pl.all_horizontal(pl.all().is_finite()))
    return [finite[name].to_numpy() for name in names]


def _is_log(name: str, *values: Floats) -> bool:
    """Whether a measure is drawn on a log scale: ratios and exponentials are."""
    return name not in LEARNING and all(bool((v > 0).all()) for v in values)
