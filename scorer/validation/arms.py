"""The arms of a validation: sets of records to train on, chosen by scores or as baselines.

Knows record ids and tokens; neither texts nor models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import polars as pl

from scorer.options import from_options
from scorer.selection.config import CHOICES, SelectConfig
from scorer.types import ScorerError
from scorer.validation.comparison import UNTRAINED
from scorer.validation.config import BASELINES, SELECTED
from scorer.validation.recipes import SUFFIX, read_toml

TOLERANCE = 0.01  # by which the tokens of two arms may differ that are to have equally many
NAME = re.compile(r"[A-Za-z0-9._-]{1,60}")  # it is part of a folder's name


@dataclass(frozen=True, slots=True)
class Arm:
    """A name, and how its records are chosen: by `config` from the scores of `run` (None: the validated run's own).

    Without a `config` it is a baseline.
    """

    name: str
    config: SelectConfig | None = None
    run: str | None = None


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """The records that an arm trains on with one seed, ascending, and the tokens of their responses."""

    arm: str
    seed: int
    ids: tuple[int, ...]
    tokens: int


def read_arms(names: Sequence[str], options: Mapping[str, Any]) -> list[Arm]:
    """The arms of names, or of one TOML file; `options` of the selection are the defaults of the file's arms.

    Raises ScorerError for an arm that there is not, and for a file that can't be read.
    """
    if len(names) == 1 and names[0].endswith(SUFFIX):
        tables = read_toml(Path(names[0]))
        if not tables:
            raise ScorerError(f"{names[0]}: holds no arm; write [NAME], and options of the selection below it")
        return [_read_arm(names[0], name, table, options) for name, table in tables.items()]
    arms = []
    for name in names:
        if name not in (SELECTED, *BASELINES):
            raise ScorerError(
                f"arms: '{name}' is not one of {', '.join((SELECTED, *BASELINES))}, nor one {SUFFIX} file"
            )
        arms.append(Arm(name, from_options(SelectConfig, options) if name == SELECTED else None))
    return arms


def _read_arm(file: str, name: str, table: Any, options: Mapping[str, Any]) -> Arm:
    if not isinstance(table, dict):
        raise ScorerError(f"{file}: {name} is no table; write [{name}], and options of the selection below it")
    if not NAME.fullmatch(name):
        raise ScorerError(f"{file}: an arm's name has letters, digits, '.', '_' and '-' only, not '{name}'")
    if name == UNTRAINED:
        raise ScorerError(f"{file}: {name} is the target before training; give the arm another name")
    if name in BASELINES:
        if table:
            raise ScorerError(f"{file}: {name} is a baseline, and takes no options; give the arm another name")
        return Arm(name)
    run = table.pop("run", None)
    if run is not None and not isinstance(run, str):
        raise ScorerError(f"{file}: run, of {name}, is not the path of a run directory")
    if unknown := sorted(set(table) - set(CHOICES)):
        raise ScorerError(
            f"{file}: {name} has unknown option {', '.join(unknown)}; the options are {', '.join(CHOICES)}"
        )
    if isinstance(table.get("drop_flagged"), list):
        table["drop_flagged"] = tuple(table["drop_flagged"])
    try:
        return Arm(name, from_options(SelectConfig, {**options, **table}), run)
    except (ScorerError, TypeError) as error:
        raise ScorerError(f"{file}: {name}: {error}") from error


@dataclass(frozen=True, slots=True)
class Plan:
    """How many sets are made of each arm, and how large: `count` is the number of records without a selected arm."""

    seeds: Sequence[int]
    equal: str
    count: int
    least: int  # records that each has to have


def training_sets(
    arms: Sequence[Arm], pool: pl.DataFrame, choose: Callable[[Arm], Sequence[int]], plan: Plan
) -> list[TrainingSet]:
    """The training sets of all arms, arm by arm, each with every seed.

    pool: record_id and tokens of the records to choose from, ascending. choose: the record ids that an arm with a
    configuration selects; the first such arm decides the size of the baselines.

    Raises ScorerError where a set is too small, where two arms are the same, and where none has as many tokens.
    """
    ids, tokens = pool["record_id"].to_numpy(), pool["tokens"].to_numpy()
    chosen = {arm.name: np.sort(np.searchsorted(ids, list(choose(arm)))) for arm in arms if arm.config is not None}
    first = next(iter(chosen.values()), None)
    count = plan.count if first is None else len(first)
    budget = int(tokens[first].sum()) if first is not None and plan.equal == "tokens" else None
    longest = np.argsort(-tokens, kind="stable")

    def rows_of(arm: Arm, seed: int) -> Any:
        if arm.name in chosen:
            return chosen[arm.name]
        if arm.name == "all":
            return np.arange(len(ids))
        order = longest if arm.name == "length" else np.array(Random(seed).sample(range(len(ids)), len(ids)), np.int64)
        return np.sort(order[:count] if budget is None else _fill(arm.name, order, tokens, budget))

    found = []
    for arm in arms:
        for seed in plan.seeds:
            rows = rows_of(arm, seed)
            if len(rows) < plan.least:
                raise ScorerError(
                    f"arm {arm.name}: {len(rows):,} records are too few to train on, the recipe needs {plan.least:,}: "
                    "give a larger --keep, or a recipe with a smaller batch_size"
                )
            found.append(TrainingSet(arm.name, seed, tuple(ids[rows].tolist()), int(tokens[rows].sum())))
    _check_distinct(found)
    return found


def _fill(name: str, order: Any, tokens: Any, budget: int) -> Any:
    """The first of `order` that have at most `budget` tokens, and of the others those that make up what they lack."""
    ends = np.cumsum(tokens[order])
    taken = int(np.searchsorted(ends, budget, side="right"))
    lack = budget - (int(ends[taken - 1]) if taken else 0)
    rows, rest, most = order[:taken], order[taken:], TOLERANCE * budget / 2
    while lack > most and len(fit := np.flatnonzero(tokens[rest] <= lack + most)):
        best = fit[np.argmax(tokens[rest[fit]])]
        rows, rest, lack = np.append(rows, rest[best]), np.delete(rest, best), lack - int(tokens[rest[best]])
    if lack > most:
        raise ScorerError(
            f"arm {name}: no records make the {budget:,} response tokens of the first arm: give a "
            "smaller --keep, or --equal rows"
        )
    return rows


def _check_distinct(sets: Sequence[TrainingSet]) -> None:
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for one in sets:
        other = seen.setdefault((one.seed, one.ids), one.arm)
        if other != one.arm:
            raise ScorerError(
                f"arms: {other} and {one.arm} are the same {len(one.ids):,} records, and nothing could be compared; "
                "leave one out, or give a smaller --keep"
            )
