"""Does a selection help? Fine-tunes a target on each arm, and compares the models on held-out records.

The last step of Superfiltering (arXiv 2402.00530) and Small2Large (arXiv 2402.10430). What is done is kept in the
folder, see scorer.validation.directory, and not done again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import polars as pl

from scorer.agreement.statistics import Bootstrap
from scorer.data.dataset import Dataset
from scorer.keywords import ValidateKeywords
from scorer.models.find import find_model
from scorer.options import from_options, keywords
from scorer.requirements import require
from scorer.runs.directory import Run
from scorer.runs.progress import Progress, shown
from scorer.runs.shard_file import ShardInfo
from scorer.selection.config import CHOICES, SelectConfig
from scorer.validation.arms import TrainingSet, read_arms
from scorer.validation.comparison import UNTRAINED, Comparison
from scorer.validation.config import ValidateConfig
from scorer.validation.directory import ArmFolder, ValidationFolder, digest, write_rows
from scorer.validation.recipes import Recipe, read_recipe
from scorer.validation.statistics import compare_arms

if TYPE_CHECKING:
    from scorer.validation.prepare import Prepared
    from scorer.validation.target import Target


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
    given: dict[str, Any] = {**options}
    selection = {name: given.pop(name) for name in CHOICES if name in given}
    config, chosen = from_options(ValidateConfig, given), from_options(SelectConfig, selection)
    recipe, arms = read_recipe(config.recipe, full=config.full), read_arms(config.arms, selection)
    require("validate")
    run = run if isinstance(run, Run) else Run(run)
    run.check_finished()
    folder = ValidationFolder(output)
    from scorer.validation.prepare import Asked, Source, prepare
    from scorer.validation.samples import open_encoder
    from scorer.validation.target import open_target

    with shown(progress) as receiver, folder.locked(), run.data_at(list(data)) as records:
        if fresh:
            folder.clear()
        target = open_target(config, recipe, receiver)
        records.check_unchanged()
        with run.snapshot(finished=True) as scores:
            source = Source(run, records, scores)
            encoder = open_encoder(target, recipe.max_length)
            prepared = prepare(source, encoder, Asked(config, chosen, arms, recipe.batch_size), receiver)
        identity = {
            "config": {
                "target": target.files.name,
                "revision": target.files.revision,
                **recipe.to_dict(),
                **{name: str(getattr(chosen, name)) for name in CHOICES},
                **{name: getattr(config, name) for name in ("seed", "equal")},
            },
            "template": digest(str(target.tokenizer.chat_template)),
            "data": [entry.identity for entry in records.inputs],
            "held-out records": digest([sample.value for sample in prepared.held_out]),
        }
        folder.begin(identity)
        write_rows(folder.path / "holdout.jsonl", [sample.value for sample in prepared.held_out])
        work = _Work(config, recipe, target, records, prepared, receiver)
        results = work.run(folder, identity)
        bootstrap = Bootstrap(config.resamples, config.seed)
        trained = pl.DataFrame(
            [(one.arm, len(one.ids), one.tokens) for one in prepared.sets], ["arm", "records", "tokens"], orient="row"
        )
        comparison = compare_arms(results, prepared.rows, trained, bootstrap)
        folder.finish(
            {
                "target": target.files.name,
                "recipe": config.recipe,
                "seeds": [*dict.fromkeys(s.seed for s in prepared.sets)],
            },
            comparison.to_dict(),
        )
    return comparison


@dataclass(frozen=True, slots=True)
class _Work:
    """The trainings of a validation, and the evaluation of each model."""

    config: ValidateConfig
    recipe: Recipe
    target: Target
    data: Dataset
    prepared: Prepared
    progress: Progress

    def run(self, folder: ValidationFolder, identity: Mapping[str, Any]) -> pl.DataFrame:
        """The NLLs of all models: arm String, seed Int64, row Int64, nll Float64, tokens Int64."""
        for arm in dict.fromkeys(one.arm for one in self.prepared.sets):
            sets = [one for one in self.prepared.sets if one.arm == arm]
            tokens = sum(one.tokens for one in sets) // len(sets)
            self.progress.say(f"arm {arm}: {len(sets[0].ids):,} records, {tokens:,} response tokens")
        untrained = TrainingSet(UNTRAINED, 0, (), 0)
        tables = []
        for number, one in enumerate((untrained, *self.prepared.sets)):
            fingerprint = digest({**identity, "records": one.ids, "seed": one.seed})
            name = UNTRAINED if one is untrained else f"{one.arm}-{one.seed}"
            where = f"{name} ({number} of {len(self.prepared.sets)})"
            nll = self._evaluated(folder.arm(name), one, fingerprint, where)
            tables.append(nll.select(pl.lit(one.arm).alias("arm"), pl.lit(one.seed, pl.Int64).alias("seed"), pl.all()))
        return pl.concat(tables)

    def _evaluated(self, arm: ArmFolder, one: TrainingSet, fingerprint: str, where: str) -> pl.DataFrame:
        """The NLLs of the model of one training set, which is trained unless that was done."""
        from scorer.validation.evaluate import held_out_nll

        if arm.begin(fingerprint):
            self.progress.say(f"{where}: its records changed, and it is trained again")
        known = arm.read(fingerprint)
        if known is None:
            began = time.monotonic()
            files = self.target.files
            if one.ids:
                if not arm.model.exists():
                    self._train(arm, one, where)
                files = find_model(str(arm.model), allow_pickle=self.config.allow_pickle)
            self.progress.say(f"evaluating {where} on {len(self.prepared.held_out):,} held-out records")
            records = [sample.record for sample in self.prepared.held_out]
            known = held_out_nll(files, self.target, records, self.recipe.max_length)
            seconds = round(time.monotonic() - began, 3)
            count = len(one.ids)
            arm.finish(known, ShardInfo(run_id=fingerprint, index=0, records=count, rows=known.height, seconds=seconds))
        if not self.config.keep_models:
            arm.remove_model()
        return known

    def _train(self, arm: ArmFolder, one: TrainingSet, where: str) -> None:
        from scorer.validation.samples import chosen
        from scorer.validation.trainer import Training, fine_tune

        rows = [sample.value for _, sample in chosen(self.data, one.ids)]
        write_rows(arm.path / "train.jsonl", rows)
        self.progress.say(f"training {where}: {len(rows):,} records in batches of {self.recipe.batch_size}")
        fine_tune(self.target, Training(rows, self.recipe, one.seed), arm.checkpoints, arm.model, self.progress)
