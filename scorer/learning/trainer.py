"""Fine-tunes the weak model on the responses of its data, one epoch at a time, with transformers' Trainer.

Knows transformers' training loop and its checkpoints; neither scoring nor LP.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from scorer.models.find import ModelFiles
from scorer.models.folders import SMALL_FILES
from scorer.models.load import load_causal_lm
from scorer.runs.progress import Progress
from scorer.storage.atomic import storage_error
from scorer.tokens import TokenBatch
from scorer.types import EngineError

IGNORED_LABEL = -100  # transformers' loss leaves it out
STATE = "trainer_state.json"  # Trainer writes it last: a checkpoint without it is incomplete
WEIGHT_INDEX = "*.index.json"


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """`scorer.config.Training` with its defaults resolved, the device, and what loading the model may do."""

    schedule_epochs: int
    learning_rate: float
    scheduler: str
    warmup_ratio: float
    batch_size: int
    device_batch: int
    weight_decay: float
    seed: int
    save_steps: int
    device: str
    trust_remote_code: bool
    allow_pickle: bool


def device_batch(most: int, batch_size: int) -> int:
    """How many records a forward pass takes: at most `most`, so that whole passes make a step of `batch_size`."""
    return next(n for n in range(min(most, batch_size), 0, -1) if batch_size % n == 0)


def train_to(
    epoch: int, files: ModelFiles, rows: TokenBatch, folder: Path, plan: TrainingPlan, progress: Progress
) -> Path:
    """The model as it is after `epoch` epochs: FOLDER/epoch-N, in the layout of its source, which `find_model` takes.

    Training resumes from the last complete checkpoint in `folder`. The loss is the mean over the target tokens of each
    effective batch. Weights are float32; on CUDA autocast computes in bfloat16. Raises EngineError
    where memory or the disk is full.
    """
    model_folder = folder / f"epoch-{epoch}"
    if model_folder.exists():
        return model_folder
    steps = math.ceil(len(rows) / plan.batch_size)
    tokens = len(rows.token_ids)

    def advance(done: int) -> None:
        progress.advance(done, done * tokens // len(rows))

    try:
        checkpoint, step = last_checkpoint(folder, max_step=epoch * steps)
        if step < epoch * steps:
            if checkpoint is not None and step % steps:
                progress.say(f"training goes on after step {step:,} of {epoch * steps:,}")
                advance(step % steps * plan.batch_size)
            model = load_causal_lm(
                files,
                dtype="float32",
                device=plan.device,
                attn_implementation="sdpa",
                trust_remote_code=plan.trust_remote_code,
                allow_pickle=plan.allow_pickle,
            )
            _train(model, rows, folder, plan, _StopAfterEpoch(epoch, steps, len(rows), plan, advance), checkpoint)
            checkpoint, step = last_checkpoint(folder, max_step=epoch * steps)
        if checkpoint is None or step != epoch * steps:
            raise EngineError(f"{folder}: training ended at step {step}, not {epoch * steps}")
        return _as_model(checkpoint, files, model_folder)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise EngineError("training does not fit in memory: give a smaller --device-batch or --max-length") from error
    except OSError as error:
        raise storage_error(folder, error) from error


class _StopAfterEpoch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Saves a checkpoint every `save_steps` and at the end of each epoch, and stops the training after `epoch`."""

    def __init__(self, epoch: int, steps: int, rows: int, plan: TrainingPlan, advance: Callable[[int], None]):
        self.epoch, self.steps, self.rows, self.plan, self.advance = epoch, steps, rows, plan, advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        at_end = state.global_step % self.steps == 0
        self.advance(self.rows - (self.steps - 1) * self.plan.batch_size if at_end else self.plan.batch_size)
        # Only on_epoch_end saves the last step of an epoch: a kill while a checkpoint is overwritten would lose it.
        control.should_save = not at_end and state.global_step % self.plan.save_steps == 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = True
        control.should_training_stop = state.global_step >= self.epoch * self.steps


def _train(
    model: Any,
    rows: TokenBatch,
    folder: Path,
    plan: TrainingPlan,
    callback: _StopAfterEpoch,
    checkpoint: Path | None,
) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=plan.schedule_epochs,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=plan.scheduler,
        warmup_steps=plan.warmup_ratio,  # below 1 it is a share of all steps
        per_device_train_batch_size=plan.device_batch,
        gradient_accumulation_steps=plan.batch_size // plan.device_batch,
        weight_decay=plan.weight_decay,
        seed=plan.seed,
        data_seed=plan.seed,
        bf16=plan.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
        use_cpu=plan.device == "cpu",
        save_strategy="no",  # the callback saves
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device == "cuda",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # on several devices Trainer would multiply the batch
    model.train().requires_grad_(True)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=range(len(rows)),
        data_collator=partial(_collate, rows),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _collate(rows: TokenBatch, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels: int64 [B, T]. Only a sequence's target tokens are labels."""
    shape = (len(chosen), int(rows.lengths[list(chosen)].max()))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED_LABEL)
    for i, row in enumerate(chosen):
        tokens = torch.from_numpy(rows.ids(row))
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
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
