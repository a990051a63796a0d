"""LP, how a model learns each sample: perplexities before training and after each epoch.

    RUN/                 an ordinary run directory; its score table has ppl_0 .. ppl_n, lp1 and lp1_approx
    RUN/epoch-0 ..       the ordinary run directories of each scoring
    RUN/checkpoints/     the trainer's, and with `keep_checkpoints` the model after each epoch, as epoch-1 ..

Knows runs; neither the formulas (scorer.scores.measures) nor how a model is trained (scorer.learning.trainer).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from scorer.config import SERVERS, ScoreConfig
from scorer.data.dataset import Dataset
from scorer.models.find import ModelFiles, find_model
from scorer.models.load import choose_device
from scorer.requirements import require
from scorer.runs.directory import Run
from scorer.runs.manifest import Manifest
from scorer.runs.progress import Progress, Silent
from scorer.runs.run import check_same_run, score
from scorer.runs.shards import open_encoder
from scorer.scores.measures import learning_table
from scorer.types import ScorerError, TokenSequence, one_of

if TYPE_CHECKING:
    from scorer.learning.trainer import TrainingPlan

PROTOCOL = "small2large"
FORMAT = "learning 1"  # raised whenever the meaning of the table changes
SCHEDULERS = ("cosine", "linear", "constant_with_warmup")
DEVICE_BATCH = {"cpu": 4, "cuda": 16}


@dataclass(frozen=True, slots=True)
class Training:
    """How the model is trained; the defaults are those of Small2Large (arXiv 2402.10430, section 4).

    schedule_epochs: the epochs that the learning rate's schedule spans, whether or not all are trained; None: 3, or
    `epochs` where that is more. So the first epoch of a whole training and an only one are the same. device_batch: rows
    at a time, at most; gradients add up to `batch_size`. None: by device. save_steps: steps between two checkpoints.
    """

    epochs: int = 3
    schedule_epochs: int | None = None
    learning_rate: float = 2e-5
    scheduler: str = "cosine"
    warmup_ratio: float = 0.03
    batch_size: int = 128
    device_batch: int | None = None
    weight_decay: float = 0.0
    seed: int = 42
    save_steps: int = 100

    def __post_init__(self) -> None:
        one_of("scheduler", self.scheduler, SCHEDULERS)
        for name in ("epochs", "schedule_epochs", "batch_size", "device_batch", "save_steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ScorerError(f"{name}: {value!r} is not a whole number of at least 1")
        if self.schedule_epochs is not None and self.schedule_epochs < self.epochs:
            raise ScorerError(f"schedule_epochs: {self.schedule_epochs} ends before the {self.epochs} epochs")
        if not 0 < self.learning_rate < 1 or not 0 <= self.warmup_ratio < 1 or not 0 <= self.weight_decay < 1:
            raise ScorerError("learning_rate, warmup_ratio and weight_decay are numbers from 0 to 1")
        if self.seed < 0:
            raise ScorerError(f"seed: {self.seed} is below 0")

    def plan(self, device: str) -> TrainingPlan:
        """With everything chosen that was left open."""
        from scorer.learning.trainer import TrainingPlan

        most = min(self.device_batch or DEVICE_BATCH[device], self.batch_size)
        options = asdict(self) | {
            "schedule_epochs": self.schedule_epochs or max(3, self.epochs),
            "device_batch": next(n for n in range(most, 0, -1) if self.batch_size % n == 0),
            "device": device,
        }
        del options["epochs"]
        return TrainingPlan(**options)


def learn(
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    training: Training | None = None,
    keep_checkpoints: bool = False,
    fresh: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Run:
    """Score every record of `data`, fine-tune the model on it, score again after each epoch; the run directory of LP.

    The same call again resumes, training from its last checkpoint. The loss is on the response tokens that are scored,
    and on none else. options: the fields of ScoreConfig but for `protocol`, which is small2large; a `dtype` of auto is
    float32 on a CPU, since LP is a small difference of perplexities. See `scorer.runs.run.score` for the rest.
    """
    training, progress = training or Training(), progress or Silent()
    require("lp")
    if "protocol" in options:
        raise ScorerError(f"LP is defined by the protocol {PROTOCOL}: leave protocol out")
    if str(options.get("engine")).startswith(SERVERS):
        raise ScorerError("LP scores what it trains, which no server has: give another --engine")
    device = choose_device(options.get("device", "auto"))
    if options.get("dtype", "auto") == "auto" and device == "cpu":
        options["dtype"] = "float32"
    plan = training.plan(device)
    run = Run(output)
    run.require_disk("training")
    checkpoints = run.path / "checkpoints"
    with run.locked():
        if fresh:
            discard(run)
        check_run_kind(run)
        before = Run(run.path / "epoch-0")
        quiet = Silent() if _is_complete(before) else progress  # then it is only compared with what is asked for
        runs = [score(data, before.path, strict=strict, progress=quiet, protocol=PROTOCOL, **options)]
        settings = {k: v for k, v in (asdict(plan) | {"epochs": training.epochs}).items() if k != "save_steps"}
        manifest = learning_manifest(runs[0].manifest, {"learning": settings}, training.epochs)
        if is_done(run, manifest, progress):
            _clean(checkpoints, keep_checkpoints)
            return run
        run.write_manifest(manifest)
        checkpoints.mkdir(exist_ok=True)
        chosen = dict(manifest.config)
        rows: list[TokenSequence] = []
        with runs[0].data as records:
            for epoch in range(1, training.epochs + 1):
                runs.append(Run(run.path / f"epoch-{epoch}"))
                if _is_complete(runs[-1]):
                    continue
                files = find_model(chosen["model"], revision=chosen["revision"], allow_pickle=chosen["allow_pickle"])
                rows = rows or _training_rows(records, ScoreConfig.from_dict(chosen), files)
                _check_options_used(rows, training, plan)
                model = _train(epoch, files, rows, checkpoints, plan, chosen, progress)
                again = chosen | {"model": str(model), "revision": None}
                runs[-1] = score(records, runs[-1].path, strict=strict, progress=progress, **again)
                if not keep_checkpoints:
                    shutil.rmtree(model)
        finish(run, manifest, [r.scores() for r in runs], [r.manifest for r in runs])
        _clean(checkpoints, keep_checkpoints)
    return run


def _is_complete(run: Run) -> bool:
    return run.begun and run.complete


def _training_rows(data: Dataset, config: ScoreConfig, files: ModelFiles) -> list[TokenSequence]:
    """The conditioned sequences, the very ones that are scored."""
    encoder = open_encoder(config, files)
    records = data.records()
    chunks = iter(lambda: list(islice(records, config.shard_rows)), [])
    return [sequence for chunk in chunks for sequence in encoder.encode(chunk)[1]]


def _check_options_used(rows: Sequence[TokenSequence], training: Training, plan: TrainingPlan) -> None:
    if not rows:
        raise ScorerError("no record has a response to train on: see the status column of epoch-0")
    if training.epochs * -(-len(rows) // plan.batch_size) == 1 and plan.warmup_ratio > 0:
        raise ScorerError(
            f"{len(rows)} rows are one step of batch size {plan.batch_size}, at the warm-up's learning rate of 0: "
            "nothing would be learned; give a smaller --batch-size, or --warmup-ratio 0"
        )


def _train(
    epoch: int,
    files: ModelFiles,
    rows: list[TokenSequence],
    folder: Path,
    plan: TrainingPlan,
    chosen: Mapping[str, Any],
    progress: Progress,
) -> Path:
    from scorer.learning.trainer import train_to

    progress.say(f"training {files.name}, epoch {epoch}: {len(rows):,} rows in batches of {plan.batch_size}")
    progress.begin(len(rows), 0)
    tokens = sum(len(row.token_ids) for row in rows)
    return train_to(
        epoch,
        files,
        rows,
        folder,
        plan,
        trust_remote_code=chosen["trust_remote_code"],
        allow_pickle=chosen["allow_pickle"],
        say=progress.say,
        advance=lambda done: progress.advance(done, done * tokens // len(rows)),
    )


def learning_manifest(base: Manifest, identity: Mapping[str, Any], epochs: int) -> Manifest:
    """The manifest of an LP run, from `base`, the one before training, and what `identity` adds to that one's."""
    identity = {**base.identity, **identity, "format": FORMAT}
    return replace(
        base,
        state="running",
        identity=identity,
        fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        ranking={"by": "lp1" if epochs > 1 else "lp1_approx", "lowest": True},
    )


def finish(run: Run, manifest: Manifest, tables: list[pl.DataFrame], runs: list[Manifest]) -> None:
    """Write the table, in shards of whole records, and the finished manifest."""
    table = learning_table(tables)
    shard = table["record_id"].rle_id() // manifest.config["shard_rows"]
    for index, part in enumerate(table.with_columns(shard=shard).partition_by("shard", include_key=False)):
        run.write_shard(index, part)
    run.write_manifest(
        replace(
            manifest,
            state="complete",
            status=dict(table["status"].value_counts(sort=True).iter_rows()),
            tokens=sum(r.tokens for r in runs),
            seconds=round(sum(r.seconds for r in runs), 3),
        )
    )


def check_run_kind(run: Run) -> None:
    """Raise ScorerError where the directory holds a run, and not of LP."""
    if run.begun and run.manifest.identity.get("format") != FORMAT:
        raise ScorerError(f"{run.path} holds a run of another kind: use --fresh to discard it, or another -o")


def is_done(run: Run, manifest: Manifest, progress: Progress) -> bool:
    """Whether the run that `manifest` describes is complete. Raises ScorerError where the directory holds another."""
    if not run.begun:
        return False
    check_same_run(run, manifest.identity)
    if run.complete:
        progress.say(f"{run.path} is complete already; --fresh would start over")
    return run.complete


def discard(run: Run) -> None:
    """Remove everything of an earlier run."""
    run.clear()
    for path in (*_epoch_folders(run.path), run.path / "checkpoints"):
        shutil.rmtree(path, ignore_errors=True)


def _epoch_folders(path: Path) -> Iterator[Path]:
    return (folder for folder in path.glob("epoch-*") if folder.is_dir())


def _clean(checkpoints: Path, keep: bool) -> None:
    """Remove what only an unfinished training needs: optimizer states, and unless `keep` the models."""
    for path in checkpoints.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    if not keep:
        shutil.rmtree(checkpoints, ignore_errors=True)
