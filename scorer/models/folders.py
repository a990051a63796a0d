"""Checks of a model's folder: configuration, weights in an allowed format, tokenizer, modules; and its digest.

Nothing is loaded.
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

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")  # all files of a model but its weights
MODEL_FILES = (*SMALL_FILES, "*.safetensors")
WEIGHTLESS = ("BoW", "Dropout", "Pooling", "WordWeights")  # modules of sentence-transformers without weights
PICKLED_WEIGHTS = "pytorch_model*.bin*"  # and the index of sharded ones
PICKLED = "its weights are pickled (*.bin), which can run code when read; give --allow-pickle if you trust them"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
WHOLE_FILE_BYTES = 64 << 20  # the digest reads larger files in part


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a model's folder must hold."""

    allow_pickle: bool
    weights: bool
    embedder: bool

    def check(self, folder: Path) -> None:
        """Raise ScorerError if something is missing, or pickled although that is not allowed."""
        if self.embedder:
            _check_embedder(folder, self.allow_pickle)
        else:
            check_folder(folder, self.allow_pickle, self.weights)


def check_tokenizer(folder: Path) -> None:
    """Raise ScorerError if there is no file of a tokenizer."""
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ScorerError(f"{folder}: no tokenizer (looked for {', '.join(TOKENIZER_FILES)})")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ScorerError(f"{path}: cannot be read ({one_line(error)}); copy the model again") from error


def settings_of(folder: Path) -> dict[str, Any]:
    """The object in config.json. Raises ScorerError if it can't be read or is not a JSON object."""
    settings = _read_json(folder / "config.json")
    if not isinstance(settings, dict):
        raise ScorerError(f"{folder / 'config.json'}: not a JSON object; copy the model again")
    return settings


def check_folder(folder: Path, allow_pickle: bool, weights: bool = True) -> None:
    """Raise ScorerError unless there is a configuration and, with `weights`, all weights in an allowed format."""
    if not (folder / "config.json").is_file():
        raise ScorerError(f"{folder}: no config.json there, so it is not a model's folder")
    settings_of(folder)
    if not weights:
        return
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(_read_json(index)["weight_map"].values())
        except (KeyError, AttributeError, TypeError) as error:
            raise ScorerError(f"{index}: not an index of weights; copy the model again") from error
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise ScorerError(f"{folder}: {len(missing)} weight files are missing, {missing[0]} the first")
    elif not any(folder.glob("model*.safetensors")):
        if not any(folder.glob(PICKLED_WEIGHTS)):
            raise ScorerError(f"{folder}: no weights (model.safetensors) there")
        if not allow_pickle:
            raise ScorerError(f"{folder}: {PICKLED}")


def _check_embedder(folder: Path, allow_pickle: bool) -> None:
    """Raise ScorerError unless this is a sentence-transformers model with all modules in an allowed format."""
    for kind, path in embedder_modules(folder):
        if kind == "Transformer":
            check_folder(path, allow_pickle)
            check_tokenizer(path)
            continue
        files = [file for file in (path.glob("*") if path == folder else path.rglob("*")) if file.is_file()]
        weights = [file for file in files if file.suffix == ".safetensors" or file.match(PICKLED_WEIGHTS)]
        has_files = "." not in kind and kind != "Normalize"  # other classes are not known, and Normalize has none
        if has_files and (not files or not (weights or kind in WEIGHTLESS)):
            raise ScorerError(f"{path}: files of the module {kind} are missing; copy the model again")
        pickled = {file.parent for file in files if file.name == "pytorch_model.bin"}
        if not allow_pickle and any(not (parent / "model.safetensors").is_file() for parent in pickled):
            raise ScorerError(f"{path}: {PICKLED}")


def embedder_modules(folder: Path) -> list[tuple[str, Path]]:
    """The class and the folder of each module; a class outside sentence-transformers begins with a dot.

    Raises ScorerError for a model from which sentence-transformers would make another one, with mean pooling: one
    without modules.json, or one that does not embed a text as one vector.
    """
    path, settings = folder / "modules.json", folder / "config_sentence_transformers.json"
    if not path.is_file():
        raise ScorerError(f"{folder}: not a sentence-transformers model, which has a modules.json")
    modules = []
    try:
        for module in _read_json(path):
            package, _, kind = module["type"].rpartition(".")
            own = package.partition(".")[0] == "sentence_transformers"
            modules.append((kind if own else f".{module['type']}", folder / module["path"]))
        model_type = _read_json(settings).get("model_type") if settings.is_file() else None
    except (KeyError, AttributeError, TypeError) as error:
        raise ScorerError(f"{path}: cannot be read ({one_line(error)}); copy the model again") from error
    if model_type not in (None, "SentenceTransformer"):
        raise ScorerError(f"{folder}: a {model_type}, which does not embed a text as one vector; use another embedder")
    return modules


def digest(folder: Path, deep: bool) -> str:
    """SHA-256 over the names, sizes and contents of a model's files; deep: in its folders too.

    The content of a file over 64 MiB counts with its first and its last MiB.
    """
    total = hashlib.sha256()
    glob = folder.rglob if deep else folder.glob
    for path in sorted({p for pattern in (*MODEL_FILES, PICKLED_WEIGHTS) for p in glob(pattern)}):
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= WHOLE_FILE_BYTES:
                content = hashlib.file_digest(file, "sha256")
            else:
                content = hashlib.sha256(file.read(1 << 20))
                file.seek(-(1 << 20), os.SEEK_END)
                content.update(file.read())
        total.update(f"{path.relative_to(folder).as_posix()}\0{size}\0{content.hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def pickled_only(files: Sequence[PurePosixPath]) -> bool:
    """Whether any of the folders of `files` has pickled weights and no safetensors."""
    safe = {file.parent for file in files if file.suffix == ".safetensors"}
    return any(file.match(PICKLED_WEIGHTS) and file.parent not in safe for file in files)
