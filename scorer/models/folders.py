"""What is in a model's folder: files, the weights among them, configuration, tokenizer, modules. Nothing is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from scorer.faults import one_line
from scorer.types import ScorerError

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")  # all files of a model but its weights
MODEL_FILES = (*SMALL_FILES, "*.safetensors")
MORE_TEMPLATES = "additional_chat_templates/*.jinja"  # transformers reads them in any local folder
WEIGHTLESS = ("BoW", "Dropout", "Pooling", "WordWeights")  # modules of sentence-transformers without weights
SAFE_WEIGHTS, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model*.bin*"  # and the index of sharded ones
PICKLED = "its weights are pickled (*.bin), which can run code when read; give --allow-pickle if you trust them"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Counts in a configuration which libraries do not check: a layer is made for each, before any is compared.
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "num_attention_heads", "n_head", "num_key_value_heads")
LARGEST_COUNT = 10_000
JSON_BYTES = 64 << 20  # the index of the largest models has a tenth of it


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
            check_config(folder)
            if self.weights:
                weight_files(folder, self.allow_pickle)


def model_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """The files of a model, sorted; deep: with those in its folders. Raises ScorerError for one that can't be read.

    No other kind of file passes: who opens a named pipe may wait for ever.
    """
    patterns = (*MODEL_FILES, PICKLED_WEIGHTS, *(() if deep else (MORE_TEMPLATES,)))
    glob = folder.rglob if deep else folder.glob
    paths = sorted({path for pattern in patterns for path in glob(pattern)})
    for path in paths:
        if not path.is_file():
            raise ScorerError(f"{path}: not a file (a folder, a pipe or a broken link); copy the model again")
        if not os.access(path, os.R_OK):
            raise ScorerError(f"{path}: can't be read; change its permissions")
    return paths


def check_tokenizer(folder: Path) -> None:
    """Raise ScorerError if there is no file of a tokenizer."""
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ScorerError(f"{folder}: no tokenizer (looked for {', '.join(TOKENIZER_FILES)})")


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > JSON_BYTES:
            raise ValueError(f"larger than {JSON_BYTES >> 20} MiB")
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ScorerError(f"{path}: cannot be read ({one_line(error)}); copy the model again") from error


def settings_of(folder: Path) -> dict[str, Any]:
    """The object in config.json. Raises ScorerError if it can't be read or is not a JSON object."""
    settings = _read_json(folder / "config.json")
    if not isinstance(settings, dict):
        raise ScorerError(f"{folder / 'config.json'}: not a JSON object; copy the model again")
    return settings


def check_config(folder: Path) -> None:
    """Raise ScorerError unless there is a usable configuration, and no other that adds to the weights."""
    names = {path.name for path in model_files(folder)}
    if "config.json" not in names:
        raise ScorerError(f"{folder}: no config.json there, so it is not a model's folder")
    settings = settings_of(folder)
    if "adapter_config.json" in names:  # some libraries would apply it, some would not
        raise ScorerError(f"{folder}: it has an adapter (adapter_config.json); merge it into the weights, or remove it")
    for name in COUNTS:
        if isinstance(count := settings.get(name), int) and not 0 < count <= LARGEST_COUNT:
            raise ScorerError(f"{folder / 'config.json'}: {name} can't be {count}; copy the model again")
    if settings.get("transformers_weights"):
        raise ScorerError(f"{folder / 'config.json'}: transformers_weights is not supported; use {SAFE_WEIGHTS}")


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files of a model's weights: safetensors, or pickled ones if these are allowed and there are no safetensors.

    Every library that loads the weights is told to load these. Raises ScorerError where it could not be told, and
    where a file is missing.
    """
    paths = model_files(folder)
    if pickled_folders(paths):
        if not allow_pickle:
            raise ScorerError(f"{folder}: {PICKLED}")
        return [path for path in paths if path.match(PICKLED_WEIGHTS)]
    single, index = folder / SAFE_WEIGHTS, folder / SAFE_INDEX
    if index not in paths:
        if single not in paths:
            raise ScorerError(f"{folder}: no weights ({SAFE_WEIGHTS}) there")
        return [single]
    try:
        shards = sorted({folder / shard for shard in _read_json(index)["weight_map"].values()})
    except (KeyError, AttributeError, TypeError) as error:
        raise ScorerError(f"{index}: not an index of weights; copy the model again") from error
    if outside := [shard for shard in shards if shard.parent != folder]:
        raise ScorerError(f"{index}: it names a file outside its folder, {outside[0]}; copy the model again")
    if others := [shard for shard in shards if shard.suffix != ".safetensors"]:
        raise ScorerError(f"{index}: it names a file that is no safetensors, {others[0].name}; copy the model again")
    if missing := [shard.name for shard in shards if shard not in paths]:
        raise ScorerError(f"{folder}: {len(missing)} weight files are missing, {missing[0]} the first")
    if single in paths and shards != [single]:
        raise ScorerError(f"{folder}: weights in {single.name} and in the files of {index.name}; remove one of the two")
    return shards


def pickled_folders(files: Collection[PurePath], safe: Collection[str] = (SAFE_WEIGHTS, SAFE_INDEX)) -> set[PurePath]:
    """The folders of `files` with pickled weights and none of the files `safe`."""
    unpickled = {file.parent for file in files if file.name in safe}
    return {file.parent for file in files if file.match(PICKLED_WEIGHTS)} - unpickled


def _check_embedder(folder: Path, allow_pickle: bool) -> None:
    """Raise ScorerError unless this is a sentence-transformers model with all modules in an allowed format."""
    model_files(folder, deep=True)
    for kind, path in embedder_modules(folder):
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise ScorerError(f"{folder}: its module {kind} is outside, in {path}; copy the model again")
        if kind == "Transformer":
            check_config(path)
            weight_files(path, allow_pickle)
            check_tokenizer(path)
            continue
        files = [file for file in (path.glob("*") if path == folder else path.rglob("*")) if file.is_file()]
        weights = [file for file in files if file.suffix == ".safetensors" or file.match(PICKLED_WEIGHTS)]
        has_files = "." not in kind and kind != "Normalize"  # other classes are not known, and Normalize has none
        if has_files and (not files or not (weights or kind in WEIGHTLESS)):
            raise ScorerError(f"{path}: files of the module {kind} are missing; copy the model again")
        if not allow_pickle and pickled_folders(files, (SAFE_WEIGHTS,)):  # of a module in shards, others would load
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
