"""What a model's folder has to hold: configuration, weights in an allowed format, tokenizer, modules; and its digest.

It does not know how the folder was had, and loads nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from scorer.models.quiet import one_line
from scorer.types import ScorerError

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")  # of a model: all but its weights
MODEL_FILES = (*SMALL_FILES, "*.safetensors")
WEIGHTLESS = ("BoW", "Dropout", "Pooling", "WordWeights")  # sentence-transformers' modules without weights
OWN = "sentence_transformers."
PICKLED_WEIGHTS = "pytorch_model*.bin*"  # the weights, and the index of sharded ones
PICKLE_HELP = "which can run code when read; give --allow-pickle if you trust them"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
WHOLE_FILE_BYTES = 64 << 20  # up to this size a file counts into a folder's digest with all its bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a model's folder has to hold."""

    allow_pickle: bool
    weights: bool
    embedder: bool

    def check(self, folder: Path) -> None:
        """Raise ScorerError where something is missing, or pickled and not allowed to be."""
        if self.embedder:
            _check_embedder(folder, self.allow_pickle)
        else:
            check_folder(folder, self.allow_pickle, self.weights)


def check_tokenizer(folder: Path) -> None:
    """Raise ScorerError unless a tokenizer's file is there."""
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ScorerError(f"{folder}: no tokenizer (looked for {', '.join(TOKENIZER_FILES)})")


def settings_of(folder: Path) -> dict[str, Any]:
    """The object in config.json. Raises ScorerError where it cannot be read, or holds anything but a JSON object."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of ValueError: not JSON, not UTF-8
        raise ScorerError(f"{path}: cannot be read ({one_line(error)}); copy the model again") from error
    if not isinstance(settings, dict):
        raise ScorerError(f"{path}: not a model's configuration, which is a JSON object; copy the model again")
    return settings


def check_folder(folder: Path, allow_pickle: bool, weights: bool = True) -> None:
    """Raise ScorerError unless `folder` holds a configuration and (unless not) all weights, in an allowed format."""
    if not (folder / "config.json").is_file():
        raise ScorerError(f"{folder}: no config.json there, so it is not a model's folder")
    settings_of(folder)
    index = folder / "model.safetensors.index.json"
    if not weights:
        return
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ScorerError(f"{index}: not an index of weights; copy the model again") from error
        if absent := sorted(s for s in shards if not (folder / s).is_file()):
            raise ScorerError(f"{folder}: {len(absent)} weight files are missing, {absent[0]} the first")
    elif not any(folder.glob("model*.safetensors")):
        if not any(folder.glob(PICKLED_WEIGHTS)):
            raise ScorerError(f"{folder}: no weights (model.safetensors) there")
        if not allow_pickle:
            raise ScorerError(f"{folder}: its weights are pickled (*.bin), {PICKLE_HELP}")


def _check_embedder(folder: Path, allow_pickle: bool) -> None:
    """Raise ScorerError unless `folder` holds a sentence-transformers model, all its modules in an allowed format."""
    for kind, place in embedder_modules(folder):
        if kind == "Transformer":
            check_folder(place, allow_pickle)
            check_tokenizer(place)
            continue
        files = [path for path in (place.glob("*") if place == folder else place.rglob("*")) if path.is_file()]
        weights = [path for path in files if path.suffix == ".safetensors" or path.match(PICKLED_WEIGHTS)]
        known = "." not in kind and kind != "Normalize"  # which may have no files
        if known and (not files or not (weights or kind in WEIGHTLESS)):
            raise ScorerError(f"{place}: files of the module {kind} are missing; copy the model again")
        pickled = [path for path in weights if path.name == "pytorch_model.bin"]
        if not allow_pickle and any(not path.with_name("model.safetensors").is_file() for path in pickled):
            raise ScorerError(f"{place}: its weights are pickled (*.bin), {PICKLE_HELP}")


def embedder_modules(folder: Path) -> list[tuple[str, Path]]:
    """The class (with a dot where it is not sentence-transformers' own) and the folder of each module of a model.

    Raises ScorerError for what sentence-transformers would turn into mean pooling: a model that is not its own, and one
    of its own that does not embed a text as one vector.
    """
    path, settings = folder / "modules.json", folder / "config_sentence_transformers.json"
    if not path.is_file():
        raise ScorerError(f"{folder}: not a sentence-transformers model, which has a modules.json")
    try:
        listed = [(m["type"], folder / m["path"]) for m in json.loads(path.read_text("utf-8"))]
        modules = [(t.rpartition(".")[2] if t.startswith(OWN) else f".{t}", place) for t, place in listed]
        kind = json.loads(settings.read_text("utf-8")).get("model_type") if settings.is_file() else None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ScorerError(f"{path}: cannot be read ({one_line(error)}); copy the model again") from error
    if kind not in (None, "SentenceTransformer"):
        raise ScorerError(f"{folder}: a {kind}, which does not embed a text as one vector; choose another embedder")
    return modules


def digest(folder: Path, deep: bool) -> str:
    """A digest of a model's files; deep: of those in its folders too."""
    total = hashlib.sha256()
    glob = folder.rglob if deep else folder.glob
    for path in sorted({p for pattern in (*MODEL_FILES, PICKLED_WEIGHTS) for p in glob(pattern)}):
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= WHOLE_FILE_BYTES:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                ends = hashlib.sha256(file.read(1 << 20))
                file.seek(-(1 << 20), os.SEEK_END)
                ends.update(file.read())
                content = ends.hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{size}\0{content}\n".encode())
    return f"sha256:{total.hexdigest()}"


def pickled_only(files: Sequence[PurePosixPath]) -> bool:
    """Whether any folder among those of `files` has weights in pickle format only."""
    safe = {file.parent for file in files if file.suffix == ".safetensors"}
    return any(file.match(PICKLED_WEIGHTS) and file.parent not in safe for file in files)
