"""Fine-tunes a target on one training set, with TRL's SFTTrainer and PEFT.

Knows TRL and its checkpoints; neither arms nor scores.
"""

from __future__ import annotations

import gc
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from scorer.faults import faults_of, one_line
from scorer.learning.trainer import device_batch, last_checkpoint
from scorer.models.load import load_causal_lm
from scorer.models.quiet import quiet
from scorer.runs.progress import Progress
from scorer.storage.atomic import replacing, storage_error
from scorer.types import EngineError, ScorerError
from scorer.validation.recipes import Lora, Recipe
from scorer.validation.target import Target

DEVICE_BATCH = {"cpu": 1, "cuda": 16}  # records; a CPU gains nothing by more, and pays for their padding


@dataclass(frozen=True, slots=True)
class Training:
    """What to train: the samples in TRL's conversational prompt-completion form, and how."""

    rows: Sequence[dict[str, Any]]
    recipe: Recipe
    seed: int


def fine_tune(target: Target, training: Training, checkpoints: Path, model: Path, progress: Progress) -> None:
    """Train, and write the model with its tokenizer to the folder `model`, an adapter merged into the weights.

    Goes on from the last complete checkpoint. The loss is the mean over the response tokens of each batch. On CUDA
    weights are bfloat16 under an adapter, and float32 with bfloat16 autocast where all are trained; on a CPU float32.
    Raises EngineError where memory or the disk is full, ScorerError where TRL can't use a row.
    """
    with _quietly(), faults_of(f"{target.files.name} can't be trained by this recipe"):
        trainer = _trainer(target, training, checkpoints, progress)
    try:
        with _quietly():
            steps = -(-len(training.rows) // training.recipe.batch_size) * training.recipe.epochs
            resumed, step = last_checkpoint(checkpoints, max_step=steps)
            if resumed is not None:
                progress.say(f"training goes on after step {step:,}")
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
            trained = trainer.model if training.recipe.lora is None else trainer.model.merge_and_unload()
            with replacing(model, folder=True) as folder:
                trained.save_pretrained(folder)
                target.tokenizer.save_pretrained(folder)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise EngineError(
            "training does not fit in memory: give a recipe with a smaller device_batch or max_length"
        ) from error
    except OSError as error:
        raise storage_error(checkpoints, error) from error
    except ScorerError:
        raise
    except Exception as error:
        raise EngineError(f"{model.parent}: training failed ({one_line(error)})") from error
    finally:  # a trainer and its model refer to each other, and the next model needs the memory
        trainer = trained = None
        gc.collect()
        torch.cuda.empty_cache()
    shutil.rmtree(checkpoints, ignore_errors=True)


def _trainer(target: Target, training: Training, folder: Path, progress: Progress) -> Any:
    recipe, cuda = training.recipe, target.config.device == "cuda"
    dtype = "bfloat16" if cuda and recipe.lora else "float32"
    model = load_causal_lm(target.files, replace(target.config, dtype=dtype), "sdpa")
    records = device_batch(recipe.device_batch or DEVICE_BATCH[target.config.device], recipe.batch_size)
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.scheduler,
        warmup_steps=recipe.warmup_ratio,  # below 1 it is a share of all steps
        per_device_train_batch_size=records,
        gradient_accumulation_steps=recipe.batch_size // records,
        gradient_checkpointing=False,
        weight_decay=recipe.weight_decay,
        max_length=recipe.max_length,
        completion_only_loss=True,
        seed=training.seed,
        data_seed=training.seed,
        bf16=cuda,
        use_cpu=not cuda,
        save_steps=recipe.save_steps,
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # on several devices Trainer would multiply the batch
    torch.manual_seed(training.seed)  # draws the adapter
    trainer = SFTTrainer(
        model=model.train().requires_grad_(True),
        args=arguments,
        train_dataset=as_dataset(training.rows),
        processing_class=target.tokenizer,
        peft_config=None if recipe.lora is None else _adapter(recipe.lora),
        callbacks=[_Report(progress, len(training.rows), recipe)],
    )
    trainer.remove_callback(PrinterCallback)
    if (left := len(trainer.train_dataset)) != len(training.rows):
        raise ScorerError(
            f"TRL can use {left:,} of {len(training.rows):,} records: the rest have no response token within "
            f"max_length ({recipe.max_length}); give a recipe with a larger one"
        )
    return trainer


def as_dataset(rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """The rows as they are: a message has its own keys, and not those of others. Raises ScorerError where one can't."""
    json_list = datasets.List(datasets.Json())
    features = {"prompt": json_list, "completion": json_list}
    if any("tools" in row for row in rows):
        rows = [{"tools": None, **row} for row in rows]
        features["tools"] = datasets.Json()
    dataset = datasets.Dataset.from_list(list(rows), features=datasets.Features(features))
    for row, held in zip(rows, dataset, strict=True):
        if held != row:
            raise ScorerError(f"a record can't be given to TRL as it is: {str(row)[:200]}")
    return dataset


def _adapter(lora: Lora) -> Any:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


class _Report(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Tells progress of each step's records."""

    def __init__(self, progress: Progress, rows: int, recipe: Recipe):
        self.progress, self.rows, self.recipe = progress, rows, recipe

    def _done(self, step: int) -> int:
        steps = -(-self.rows // self.recipe.batch_size)
        epochs, step = divmod(step, steps)
        return epochs * self.rows + step * self.recipe.batch_size

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.begin(self.rows * self.recipe.epochs, self._done(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.advance(self._done(state.global_step) - self._done(state.global_step - 1), 0)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars and notes of transformers, datasets, TRL and PEFT; their errors are raised."""
    bars, logger = datasets.utils.logging.is_progress_bar_enabled(), logging.getLogger("trl")
    level = logger.level
    datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
