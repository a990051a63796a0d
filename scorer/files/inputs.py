"""What a user may name as data: a file, a pattern, a folder, a saved dataset or one on the hub -> the files to read."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

from scorer.files.hub import SCHEME, SHORT, hub_files
from scorer.files.kinds import HINTS, KNOWN, READ, suffix_in
from scorer.files.layout import CARD, DEFAULT_SPLIT, choose, chosen_files, is_data, read_card
from scorer.storage.paths import expand, is_folder
from scorer.types import ScorerError

RUN_MARK = ".lock"  # in every run directory
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"  # of `Dataset.save_to_disk`, and of DatasetDict's


def input_files(path: str, *, split: str | None = None, subset: str | None = None) -> list[str]:
    """The paths of the data files that `path` means, in the order in which they are read.

    path: a file, which need not exist; a glob pattern; a folder of data files, or one that `save_to_disk` of Hugging
    Face's datasets wrote; `hf://datasets/ORG/NAME[@REVISION][/PATH]`, or ORG/NAME where there is no such path, which
    are downloaded; an s3:// URL or pattern; "-". split, subset: which part to read, where there are several.

    Raises ScorerError where nothing is found, where a part has to be chosen, and where a choice is given but there are
    no parts; EngineError where the network fails.
    """
    if not path:
        raise ScorerError("no data: a path is empty; name a file")
    if path.startswith(SCHEME) or _is_short_address(path):
        return hub_files(path, split=split, subset=subset)
    if "://" not in path and is_folder(Path(path)):
        return _files_in(Path(path), split, subset)
    if split is not None or subset is not None:
        option = "--split" if split is not None else "--subset"
        raise ScorerError(f"{path}: has no parts to choose from: leave out {option}")
    if "://" in path or os.path.lexists(path) or not glob.has_magic(path):
        return expand(path)
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise ScorerError(f"{path}: no file matches; check the folder and the pattern")
    return found


def _is_short_address(path: str) -> bool:
    """Whether a path can only be ORG/NAME of the hub: nothing of that name is here, and no kind of file has it."""
    if not SHORT.fullmatch(path) or os.path.lexists(path) or os.path.lexists(path.partition("/")[0]):
        return False
    return suffix_in(path, (*READ, *HINTS)) is None


def _files_in(folder: Path, split: str | None, subset: str | None) -> list[str]:
    saved = _saved(folder, split)
    if saved is not None:
        if subset is not None:
            raise ScorerError(f"{folder}: a saved dataset has no subsets: leave out --subset")
        return saved
    files = _listed(folder)
    if split is not None or subset is not None:
        card = read_card(folder / CARD) if CARD in files else {}
        found = chosen_files(str(folder), files, card, split=split, subset=subset)
    else:
        found = sorted(filter(is_data, files))
    if not found:
        raise ScorerError(f"{folder}: is a folder without a file of a kind that scorer reads: {KNOWN}")
    return [str(folder / file) for file in found]


def _listed(folder: Path) -> list[str]:
    """The paths of all files under a folder, in it, by way of links to folders too."""
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        above = os.path.realpath(root) + os.sep
        # A link to a folder above it would go round in circles; and a run directory holds no data.
        folders[:] = [
            name
            for name in folders
            if not above.startswith(os.path.realpath(f"{root}/{name}") + os.sep)
            and not os.path.exists(f"{root}/{name}/{RUN_MARK}")
        ]
        found += [Path(root, name).relative_to(folder).as_posix() for name in names]
    return found


def _saved(folder: Path, split: str | None) -> list[str] | None:
    """The Arrow files that `save_to_disk` wrote into a folder, in order; None where it is not such a folder."""
    if (folder / SAVED_SPLITS).is_file():
        splits = _read(folder / SAVED_SPLITS).get("splits")
        names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        name = choose(str(folder), "split", names, split, DEFAULT_SPLIT)
        folder, split = folder / name, None
    elif not (folder / SAVED_DATASET).is_file() or "_data_files" not in _read(folder / SAVED_DATASET):
        return None
    state = _read(folder / SAVED_DATASET)
    if split not in (None, state.get("_split")):
        raise ScorerError(f"{folder}: a saved dataset of one split, {state.get('_split')}: leave out --split")
    try:
        files = [str(folder / entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ScorerError(f"{folder / SAVED_DATASET}: does not list the data files; save the dataset again") from error
    if not files:
        raise ScorerError(f"{folder}: the saved dataset holds no records; give at least one")
    return files


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a saved dataset."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ScorerError(f"{path}: can't be read ({error}); save the dataset again") from error
    return found if isinstance(found, dict) else {}
