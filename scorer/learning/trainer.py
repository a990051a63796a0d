"""Fine-tunes the weak model on the responses of its data, one epoch at a time, with transformers' Trainer.

Knows transformers' training loop and its checkpoints; neither scoring nor LP.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from scorer.config import ScoreConfig, Training
from scorer.models.find import ModelFiles
from scorer.models.folders import SMALL_FILES
from scorer.models.load import load_causal_lm
from scorer.models.quiet import quiet
from scorer.runs.progress import Progress
from scorer.storage.atomic import storage_error
from scorer.tokens import TokenBatch
from scorer.types import EngineError

IGNORED_LABEL = -100  # transformers' loss leaves it out
STATE = "trainer_state.json"  # Trainer writes it last: a checkpoint without it is incomplete
WEIGHT_INDEX = "*.index.json"


def device_batch(most: int, batch_size: int) -> int:
    """How many records a forward pass takes: at most `most`, so that whole passes make a step of `batch_size`."""
    return next(n for n in range(min(most, batch_size), 0, -1) if batch_size % n == 0)


@dataclass(frozen=True, slots=True)
class EpochTrainer:
    """Fine-tunes the model `files` on the target tokens of `rows`, one epoch at a time, with checkpoints in `folder`.

    training: with `schedule_epochs` and `device_batch` set. config: the device, and what loading the model may do.
    """

    files: ModelFiles
    rows: TokenBatch
    folder: Path
    training: Training
    config: ScoreConfig
    progress: Progress

    @property
    def epoch_steps(self) -> int:
        """The steps of one epoch; the last one may have fewer rows."""
        return math.ceil(len(self.rows) / self.training.batch_size)

    def train_to(self, epoch: int) -> Path:
        """The model as it is after `epoch` epochs: FOLDER/epoch-N, in the layout of its source.

        Training resumes from the last complete checkpoint in `folder`. The loss is the mean over the target tokens of
        each effective batch. Weights are float32; on CUDA autocast computes in bfloat16. Raises EngineError where
        memory or the disk is full.
        """
        count, batch_size = len(self.rows), self.training.batch_size
        self.progress.say(f"training {self.files.name}, epoch {epoch}: {count:,} rows in batches of {batch_size}")
        self.progress.begin(count, 0)
        model_folder, last = self.folder / f"epoch-{epoch}", epoch * self.epoch_steps
        if model_folder.exists():
            return model_folder
        try:
            checkpoint, step = last_checkpoint(self.folder, max_step=last)
            if step < last:
                if done := step % self.epoch_steps:
                    self.progress.say(f"training goes on after step {step:,} of {last:,}")
                    self.advance(done * batch_size)
                self._train(epoch, checkpoint)
                checkpoint, step = last_checkpoint(self.folder, max_step=last)
            if checkpoint is None or step != last:
                raise EngineError(f"{self.folder}: training ended at step {step}, not {last}")
            return _as_model(checkpoint, self.files, model_folder)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise EngineError(
                "training does not fit in memory: give a smaller --device-batch or --max-length"
            ) from error
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def advance(self, rows: int) -> None:
        """Report rows as trained on, each with the mean number of tokens."""
        self.progress.advance(rows, rows * len(self.rows.token_ids) // len(self.rows))

    def _train(self, epoch: int, checkpoint: Path | None) -> None:
        training, cuda = self.training, self.config.device == "cuda"
        assert training.schedule_epochs is not None
        assert training.device_batch is not None
        model = load_causal_lm(self.files, replace(self.config, dtype="float32"), "sdpa")
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            num_train_epochs=training.schedule_epochs,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.scheduler,
            warmup_steps=training.warmup_ratio,  # below 1 it is a share of all steps
            per_device_train_batch_size=training.device_batch,
            gradient_accumulation_steps=training.batch_size // training.device_batch,
            weight_decay=training.weight_decay,
            seed=training.seed,
            data_seed=training.seed,
            bf16=cuda and torch.cuda.is_bf16_supported(including_emulation=False),
            use_cpu=not cuda,
            save_strategy="no",  # the callback saves
            save_total_limit=1,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=cuda,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # on several devices Trainer would multiply the batch
        trainer = Trainer(
            model=model.train().requires_grad_(True),
            args=arguments,
            train_dataset=range(len(self.rows)),
            data_collator=partial(_collate, self.rows),
            callbacks=[_StopAfterEpoch(self, epoch)],
        )
        trainer.remove_callback(PrinterCallback)
        with quiet():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


class _StopAfterEpoch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Saves a checkpoint every `save_steps` and at the end of each epoch, and stops the training after `epoch`."""

    def __init__(self, owner: EpochTrainer, epoch: int):
        self.owner, self.steps, self.epoch = owner, owner.epoch_steps, epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        training, at_end = self.owner.training, state.global_step % self.steps == 0
        before = (self.steps - 1) * training.batch_size  # the rows of all steps but the last
        self.owner.advance(len(self.owner.rows) - before if at_end else training.batch_size)
        # Only on_epoch_end saves the last step of an epoch: a kill while a checkpoint is overwritten would lose it.
        control.should_save = not at_end and state.global_step % training.save_steps == 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = True
        control.should_training_stop = state.global_step >= self.epoch * self.steps


def _collate(rows: TokenBatch, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels: int64 [B, T]. Only a sequence's target tokens are labels."""
    tokens = [torch.from_numpy(rows.ids(row)).long() for row in chosen]
    ids = pad_sequence(tokens, batch_first=True)
    mask = pad_sequence(list(map(torch.ones_like, tokens)), batch_first=True)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for i, row in enumerate(chosen):
        for start, end in rows.bounds(row):
            labels[i, start:end] = ids[i, start:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def last_checkpoint(folder: Path, max_step: int) -> tuple[Path | None, int]:
    """The newest complete checkpoint and its step, or None and 0. Removes incomplete ones and those past `max_step`."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            step = json.loads((path / STATE).read_text(encoding="utf-8"))["global_step"]
        except (FileNotFoundError, ValueError):
            step = max_step + 1
        if step > max_step:
            shutil.rmtree(path)
        else:
            found.append((step, path))
    step, checkpoint = max(found, default=(0, None))
    return checkpoint, step


def _as_model(checkpoint: Path, files: ModelFiles, target: Path) -> Path:
    """Make `target` of the checkpoint's weights and all other files of the model's source; it is whole or absent."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for path in (*checkpoint.glob("*.safetensors"), *checkpoint.glob(WEIGHT_INDEX), checkpoint / "config.json"):
        shutil.copyfile(path, temporary / path.name)
    for path in (path for pattern in SMALL_FILES for path in files.path.glob(pattern)):
        if not (temporary / path.name).exists() and not path.match(WEIGHT_INDEX):
            shutil.copyfile(path, temporary / path.name)
    temporary.rename(target)
    return target
