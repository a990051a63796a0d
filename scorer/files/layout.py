"""Which files of a dataset belong to a split and a subset, by the conventions of the Hugging Face hub.

A dataset's card (the YAML at the top of its README.md) may say so; else the names of files and folders do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from scorer.faults import first_line
from scorer.files.kinds import KNOWN, READ, suffix_in
from scorer.types import ScorerError

CARD = "README.md"
DEFAULT_SPLIT, DEFAULT_SUBSET = "train", "default"
SPLIT_WORDS = {  # what the names of files and folders call a split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHARD = re.compile(r"(?:.*/)?data/(\w+)-\d{5}-of-\d{5}\.\w+")  # as `Dataset.push_to_hub` names them
GLOB = re.compile(r"\*\*/|\*\*|\*|\?|\[!?[^]]+\]|.")
GLOBS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
# JSON files that describe the data beside them.
ABOUT = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


def is_data(file: str) -> bool:
    """Whether a path in a dataset is one of data: of a kind that is read, not hidden, and not about the data."""
    path = PurePosixPath(file)
    is_hidden = any(part[0] in "._" for part in path.parts)
    return suffix_in(path.name, READ) is not None and path.name not in ABOUT and not is_hidden


def matching(pattern: str, files: Collection[str]) -> list[str]:
    """The paths, sorted, that a glob pattern matches (** is any folders), or that lie in the folder it names."""
    pattern = pattern.removeprefix("./").rstrip("/")
    parts = [GLOBS.get(part) or _literal(part) for part in GLOB.findall(pattern)]
    regex = re.compile("".join(parts) + ("" if is_pattern(pattern) else "(?:/.*)?"))
    return sorted(filter(regex.fullmatch, files))


def is_pattern(path: str) -> bool:
    """Whether a path has characters that match others."""
    return any(mark in path for mark in "*?[")


def _literal(part: str) -> str:
    return f"[{part[1:-1].replace('!', '^', 1)}]" if len(part) > 1 else re.escape(part)


def choose(where: str, option: str, names: Collection[str], asked: str | None, default: str) -> str:
    """The name asked for, else the default if there is one, else the only one; else ScorerError, which lists them."""
    name = asked or (default if default in names or len(names) != 1 else next(iter(names)))
    if name in names:
        return name
    known = ", ".join(map(str, names)) or "none"
    if asked is not None:
        raise ScorerError(f"{where}: there is no {option} '{asked}'; --{option} takes one of: {known}")
    raise ScorerError(f"{where}: there are several {option}s; choose one with --{option}: {known}")


def read_card(path: Path) -> Mapping[str, Any]:
    """The YAML at the top of a README.md. Raises ScorerError where it can't be read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception as error:  # huggingface_hub passes those of its YAML parser on, and names no class of them
        raise ScorerError(f"{path}: its YAML can't be read ({first_line(error)}); name the data files") from error


def chosen_files(
    where: str, files: Sequence[str], card: Mapping[str, Any], *, split: str | None, subset: str | None
) -> list[str]:
    """The data files of a split and a subset, in order, out of all the paths in a dataset.

    Raises ScorerError, which begins with `where`, if there are none, and if `split` or `subset` has to be given.
    """
    configs = {
        str(entry.get("config_name", DEFAULT_SUBSET)): entry
        for entry in card.get("configs") or ()
        if isinstance(entry, dict) and ("data_files" in entry or "data_dir" in entry)
    }
    if configs:
        default = next((name for name, entry in configs.items() if entry.get("default")), DEFAULT_SUBSET)
        entry = configs[choose(where, "subset", configs, subset, default)]
        folder = str(entry.get("data_dir") or "").removeprefix("./").strip("/")
        if folder:
            files = [file for file in files if file.startswith(f"{folder}/")]
        if entry.get("data_files"):
            patterns = _patterns(entry["data_files"])
            wanted = patterns[choose(where, "split", patterns, split, DEFAULT_SPLIT)]
            inside = [str(PurePosixPath(folder, pattern)) for pattern in wanted]
            return _data(where, list(dict.fromkeys(file for pattern in inside for file in matching(pattern, files))))
    elif subset is not None:
        files = [file for file in files if subset in PurePosixPath(file).parts[:-1]]
        if not files:
            raise ScorerError(f"{where}: there is no subset '{subset}': leave out --subset, or name the files")
    splits: dict[str | None, list[str]] = {}
    for file in _data(where, sorted(files)):
        splits.setdefault(_split_of(file), []).append(file)
    named = {name: found for name, found in splits.items() if name is not None}
    if not named and split is None:
        return splits[None]
    return named[choose(where, "split", named, split, DEFAULT_SPLIT)]


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Split -> glob patterns: a card has a mapping, a list of them, or patterns alone, which are the default split."""
    if isinstance(data_files, dict):
        return {str(split): _listed(paths) for split, paths in data_files.items()}
    entries = _listed(data_files)
    if all(isinstance(entry, dict) for entry in entries):
        return {str(entry.get("split", DEFAULT_SPLIT)): _listed(entry.get("path", [])) for entry in entries}
    return {DEFAULT_SPLIT: [str(entry) for entry in entries]}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _data(where: str, files: Sequence[str]) -> list[str]:
    """Those that are data. Raises ScorerError where none is."""
    if found := [file for file in files if is_data(file)]:
        return found
    held = f" ({', '.join(files[:5])}{', ...' if len(files) > 5 else ''})" if files else ""
    raise ScorerError(f"{where}: there is no file{held} of a kind that scorer reads: {KNOWN}")


def _split_of(file: str) -> str | None:
    """The split that a path names: in the file's name, or else in the nearest folder's."""
    if shard := SHARD.fullmatch(file):
        return SPLIT_WORDS.get(shard[1], shard[1])
    for part in reversed(PurePosixPath(file).parts):
        for word in re.split(r"[^a-z0-9]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None
