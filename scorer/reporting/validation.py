"""The folder of a validation -> what the page says of it. Knows no pictures; scorer.reporting.report draws them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scorer.agreement.statistics import Estimate
from scorer.faults import faults_of
from scorer.runs.directory import Run
from scorer.types import ScorerError
from scorer.validation.comparison import Comparison
from scorer.validation.directory import VALIDATION, read_validation
from scorer.validation.tables import TextTable, sentences, tables

FACTS = ("target", "recipe", "seeds")  # of validation.json


@dataclass(frozen=True, slots=True)
class Validation:
    """What was validated, what comes of it, and the differences of the mean of rows to the baseline, by arm."""

    facts: str
    sentences: list[str]
    tables: list[TextTable]
    baseline: str | None
    differences: dict[str, Estimate]


def read(folder: Path, run: Run) -> Validation:
    """What a finished validation of a run found.

    Raises ScorerError where there is none, where it is of other data, and where its results can't be read.
    """
    content = read_validation(folder)
    if content["identity"].get("data") != run.manifest.identity.get("inputs"):
        raise ScorerError(f"{folder} is a validation of other data than {run.path}: name the run that was validated")
    if content.get("results") is None:
        raise ScorerError(f"{folder} is unfinished: run the same command that validates again to finish it")
    with faults_of(f"{folder / VALIDATION} has no results that can be read; restore it"):
        found = Comparison.from_dict(content["results"])
        return Validation(
            facts="; ".join(f"{name}: {_text(content[name])}" for name in FACTS if name in content),
            sentences=[*sentences(found)],
            tables=tables(found, full=True),
            baseline=found.baseline,
            differences={pair.arm: pair.mean_of_rows for pair in found.against_baseline},
        )


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
