"""Scoring and selecting in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from scorer.config import Part, ScoreConfig
from scorer.files.memory import is_in_memory
from scorer.files.upload import on_hub
from scorer.keywords import FilterKeywords
from scorer.options import keywords, take
from scorer.runs.progress import Progress
from scorer.runs.run import score
from scorer.runs.sources import files_of, open_dataset
from scorer.selection.config import SelectConfig
from scorer.selection.export import check_apart, check_measure, check_options, select
from scorer.selection.inputs import check_column
from scorer.selection.selection import Selection
from scorer.storage.atomic import is_stream
from scorer.storage.paths import to_path
from scorer.types import ScorerError


@keywords(score, Part, ScoreConfig, SelectConfig)
def filter(
    data: Any,
    output: str | Path,
    run: str | Path | None = None,
    *,
    progress: Progress | bool | None = None,
    **options: Unpack[FilterKeywords],
) -> Selection:
    """Score every record of `data`, and write the best to `output`; the same call again resumes.

    data, fresh, strict, cluster, progress: as in `scorer.score`. output: as in `scorer.select`. run: the directory that
    keeps the scores; None is `output` with .run at its end, and an output on the hub needs a name. What needs clusters
    (per_cluster, diverse, and some flags) is for `scorer.select`, after `scorer.cluster`.

    Raises ScorerError and EngineError as these do, and where an option of the selection can be known to be wrong,
    before anything is scored.
    """
    given: dict[str, Any] = {**options}
    selection, scoring, part = (take(config, given) for config in (SelectConfig, ScoreConfig, Part))
    config, score_config = SelectConfig(**selection), ScoreConfig(**scoring)
    directory = run_beside(output) if run is None else str(run)
    paths = [] if is_in_memory(data) else files_of(data, Part(**part))
    check_options(paths, output, config)
    check_measure(config.by, score_config.protocol)
    check_apart(directory, [str(path) for path in (output, config.rejected) if path is not None])
    left = Part() if paths else Part(**part)  # of files, the part is chosen already
    dataset = open_dataset(paths or data, directory, score_config, left, fresh=given.get("fresh", False))
    with dataset:
        check_column(dataset, config.per)
        scored = score(dataset, directory, progress=progress, **given, **scoring)
    return select(scored, output, **selection)


def run_beside(output: str | Path) -> str:
    """The run directory of an output that comes with none. Raises ScorerError for an output that is no file here."""
    if on_hub(output):
        raise ScorerError(f"run: {output} is on the hub, and the scores stay here; name a directory with --run RUN")
    if is_stream(to_path(output)):
        raise ScorerError(f"run: {output} is no file that scores could be kept beside; name a directory with --run RUN")
    return f"{str(output).rstrip('/')}.run"
