"""Does a selection help? Fine-tunes a target on each arm, and compares the models on held-out records.

The last step of Superfiltering (arXiv 2402.00530) and Small2Large (arXiv 2402.10430). What is done is kept in the
folder, see scorer.validation.directory, and not done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import polars as pl

from scorer.agreement.statistics import Bootstrap
from scorer.keywords import ValidateKeywords
from scorer.options import from_options, keywords
from scorer.requirements import require
from scorer.runs.directory import Run
from scorer.runs.progress import Progress, shown
from scorer.selection.config import CHOICES, SelectConfig
from scorer.selection.export import named_files
from scorer.types import ScorerError
from scorer.validation.arms import read_arms
from scorer.validation.comparison import Comparison
from scorer.validation.config import ValidateConfig
from scorer.validation.directory import ValidationFolder, write_rows
from scorer.validation.recipes import read_recipe
from scorer.validation.statistics import compare_arms


@keywords(ValidateConfig)
def validate(
    run: Run | str | Path,
    output: str | Path,
    *,
    data: Sequence[str | Path] = (),
    fresh: bool = False,
    progress: Progress | bool | None = None,
    **options: Unpack[ValidateKeywords],
) -> Comparison:
    """Fine-tune `target` on each arm of a finished run, once a seed, and compare the models on held-out records.

    output: the folder of the validation; the same call again goes on after what is done there. fresh: discard what is
    there. data: see `scorer.select`. The options of `scorer.select` that say which records are kept are those of the
    arm `selected`. Models are compared by the NLL of the held-out responses after their prompts, in nats.

    Raises ScorerError, before anything is trained, where the run is unfinished, where the options, the recipe or the
    target don't fit, where there are too few records or equal arms, and where an arm would train on what is held out;
    EngineError where the machine fails.
    """
    files = named_files(data)
    given: dict[str, Any] = {**options}
    selection = {name: given.pop(name) for name in CHOICES if name in given}
    config, chosen = from_options(ValidateConfig, given), from_options(SelectConfig, selection)
    recipe, arms = read_recipe(config.recipe, full=config.full), read_arms(config.arms, selection)
    require("validate")
    run = run if isinstance(run, Run) else Run(run)
    run.check_finished()
    folder = ValidationFolder(output)
    from scorer.validation.judge import Judge, JudgeClient
    from scorer.validation.prepare import Asked, Source, prepare
    from scorer.validation.samples import open_encoder
    from scorer.validation.target import open_target
    from scorer.validation.trainings import Trainings

    judge = None
    if config.judge is not None and config.judge_model is not None:
        if len(arms) < 2:
            raise ScorerError("judge: it compares the answers of two arms; name another with --arms")
        judge = Judge(config.judge, config.judge_model)
        JudgeClient(judge).check()
    with shown(progress) as receiver, folder.locked(), run.data_at(files) as records:
        target = open_target(config, recipe, receiver)
        records.check_unchanged()
        with run.snapshot(finished=True) as scores:
            encoder, asked = open_encoder(target), Asked(config, chosen, arms, recipe.least_records)
            prepared = prepare(Source(run, records, scores), encoder, asked, receiver)
        trainings = Trainings(config, recipe, target, encoder, records, prepared, receiver)
        identity = trainings.identity(chosen)
        folder.begin(identity, fresh=fresh)
        write_rows(folder.path / "holdout.jsonl", [sample.value for sample in prepared.held_out])
        results = trainings.run(folder, identity)
        sizes = [(one.arm, len(one.ids), one.tokens) for one in prepared.sets]
        trained = pl.DataFrame(sizes, ["arm", "records", "tokens"], orient="row")
        comparison = compare_arms(results, prepared.rows, trained, Bootstrap(config.resamples, config.seed))
        if judge is not None:
            comparison = replace(comparison, verdicts=trainings.judged(folder, judge))
        seeds = list(dict.fromkeys(one.seed for one in prepared.sets))
        folder.finish({"target": target.files.name, "recipe": config.recipe, "seeds": seeds}, comparison.to_dict())
    return comparison
