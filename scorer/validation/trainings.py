"""The trainings of a validation, and what each model gives: the NLLs of the held-out responses, answers, verdicts.

Each is kept in the folder as soon as it is there, and not made again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from random import Random
from typing import Any

import polars as pl

from scorer.data.dataset import Dataset
from scorer.encoding.chat import Conversation
from scorer.encoding.encoder import Encoder
from scorer.models.find import ModelFiles, find_model
from scorer.runs.manifest import digest
from scorer.runs.progress import Progress
from scorer.selection.config import CHOICES, SelectConfig
from scorer.validation.answers import AnswerOptions, answer
from scorer.validation.arms import TrainingSet
from scorer.validation.comparison import UNTRAINED, Verdicts
from scorer.validation.config import ValidateConfig
from scorer.validation.directory import ArmFolder, ValidationFolder, write_rows
from scorer.validation.evaluate import held_out_nll
from scorer.validation.judge import Judge, Pair, prompt_text
from scorer.validation.prepare import Prepared
from scorer.validation.recipes import Recipe
from scorer.validation.samples import chosen, training_row
from scorer.validation.target import Target
from scorer.validation.trainer import Training, fine_tune
from scorer.validation.verdicts import count_verdicts, judge_pairs

NLL, ANSWERS = "nll.parquet", "answers.parquet"
BASE = TrainingSet(UNTRAINED, 0, (), 0)


@dataclass(frozen=True)
class Trainings:
    """All trainings, with what they need."""

    config: ValidateConfig
    recipe: Recipe
    target: Target
    encoder: Encoder
    data: Dataset
    prepared: Prepared
    progress: Progress
    _answered: dict[tuple[str, int], dict[int, str | None]] = field(default_factory=dict)  # by arm and seed

    def identity(self, selection: SelectConfig) -> dict[str, Any]:
        """What all trainings depend on, as JSON values. selection: the options of the arm `selected`."""
        return {
            "config": {
                "target": self.target.files.name,
                "revision": self.target.files.revision,
                **asdict(self.recipe),
                **{name: str(getattr(selection, name)) for name in CHOICES},
                **{name: getattr(self.config, name) for name in ("seed", "equal")},
            },
            "template": digest(str(self.target.tokenizer.chat_template)),
            "data": [entry.identity for entry in self.data.inputs],
            "held-out records": digest([sample.value for sample in self.prepared.held_out]),
        }

    def run(self, folder: ValidationFolder, identity: Mapping[str, Any]) -> pl.DataFrame:
        """The NLLs by all models: arm String, seed Int64, row Int64, nll Float64 (nats), tokens Int64.

        Trains what is not done, and with a judge also answers its prompts.
        """
        sets = self.prepared.sets
        for arm in dict.fromkeys(one.arm for one in sets):
            sizes = [(len(one.ids), one.tokens) for one in sets if one.arm == arm]
            records, tokens = (round(sum(size) / len(sizes)) for size in zip(*sizes, strict=True))
            self.progress.say(f"arm {arm}: {records:,} records, {tokens:,} response tokens")
        tables = []
        for number, one in enumerate((BASE, *sets)):
            name = UNTRAINED if one is BASE else f"{one.arm}-{one.seed}"
            fingerprint = digest({**identity, "records": one.ids, "seed": one.seed})
            place = ArmFolder(folder.path / "arms" / name, fingerprint)
            if place.replaced:
                self.progress.say(f"{name}: its records are others than before, and it is trained again")
            nll = self._finished(place, one, f"{name} ({number} of {len(sets)})")
            tables.append(nll.select(pl.lit(one.arm).alias("arm"), pl.lit(one.seed, pl.Int64).alias("seed"), pl.all()))
        return pl.concat(tables)

    def _finished(self, place: ArmFolder, one: TrainingSet, where: str) -> pl.DataFrame:
        """The NLLs by the model of one training set, which is trained if they or its answers are not there."""
        nll, asked = place.read(NLL), self.config.judge is not None and one is not BASE
        answers = self._read_answers(place) if asked else None
        to_answer = asked and answers is None
        earlier = nll is not None and place.model.exists()  # kept by another command
        if nll is not None and to_answer and not earlier:
            self.progress.say(f"{where}: its model was not kept, as --keep-models would; it is trained again to answer")
        if nll is None or to_answer:
            files = self._model(place, one, where)
            if nll is None:
                began = time.monotonic()
                self.progress.say(f"evaluating {where} on {len(self.prepared.held_out):,} held-out records")
                records = [sample.record for sample in self.prepared.held_out]
                nll = held_out_nll(files, self.target, self.encoder, records)
                place.write(NLL, nll, time.monotonic() - began)
            if to_answer:
                answers = self._answer(place, files)
        if answers is not None:
            self._answered[one.arm, one.seed] = answers
        if not self.config.keep_models and not earlier:
            place.remove_model()
        return nll

    def _answer(self, place: ArmFolder, files: ModelFiles) -> dict[int, str | None]:
        prompts, most, began = self._prompts, self.config.answer_tokens, time.monotonic()
        options = AnswerOptions(self.target.config, max_tokens=most)
        answers = dict(zip(prompts, answer(files, list(prompts.values()), options, self.progress), strict=True))
        texts = pl.Series(answers.values(), dtype=pl.String)
        table = pl.DataFrame({"row": list(answers), "answer": texts}).with_columns(max_tokens=most)
        place.write(ANSWERS, table, time.monotonic() - began)
        return answers

    def _read_answers(self, place: ArmFolder) -> dict[int, str | None] | None:
        """The answers that were written; None where there are none, or to other prompts, or of another length."""
        table = place.read(ANSWERS)
        if table is None or table["row"].to_list() != list(self._prompts):
            return None
        same = table["max_tokens"].unique().to_list() == [self.config.answer_tokens]
        return dict(table.select("row", "answer").iter_rows()) if same else None

    def _model(self, place: ArmFolder, one: TrainingSet, where: str) -> ModelFiles:
        if one is BASE:
            return self.target.files
        if not place.model.exists():
            rows = [training_row(sample, self.encoder) for sample in chosen(self.data, one.ids)]
            self.data.check_unchanged()
            write_rows(place.path / "train.jsonl", rows)
            self.progress.say(f"training {where}: {len(rows):,} records in batches of {self.recipe.batch_size}")
            training = Training(rows, self.recipe, one.seed)
            fine_tune(self.target, training, place.checkpoints, place.model, self.progress)
        return find_model(str(place.model), allow_pickle=self.config.allow_pickle)

    @cached_property
    def _prompts(self) -> dict[int, Conversation]:
        """The prompts that are answered, by the index of the held-out record: drawn by the first seed."""
        held_out = self.prepared.held_out
        count = min(len(held_out), self.config.judge_prompts)
        rows = sorted(Random(self.config.seed).sample(range(len(held_out)), count))
        values = {row: training_row(held_out[row], self.encoder) for row in rows}
        return {row: Conversation(value["prompt"], value.get("tools", ())) for row, value in values.items()}

    def judged(self, folder: ValidationFolder, judge: Judge) -> tuple[Verdicts, ...]:
        """The judge's verdicts on the answers of the first arm against those of each other one, seed by seed."""
        prompts = {row: prompt_text(prompt) for row, prompt in self._prompts.items()}
        first = self.prepared.sets[0].arm
        pairs = [
            Pair(row, first, other, seed, prompt, self._answered[first, seed][row], answers[row])
            for (other, seed), answers in self._answered.items()
            if other != first
            for row, prompt in prompts.items()
        ]
        return count_verdicts(judge_pairs(judge, pairs, folder.path / "verdicts", self.progress))
