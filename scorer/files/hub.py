"""Datasets on the Hugging Face hub: an address -> the data files it means -> their copies in the hub's cache.

huggingface_hub is imported where it is used, so that this module loads in milliseconds.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from scorer.faults import one_line
from scorer.files.layout import CARD, chosen_files, is_pattern, matching, read_card
from scorer.types import EngineError, ScorerError

SCHEME = "hf://"
PREFIX = "hf://datasets/"
NAME = r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?"
SHORT = re.compile(NAME)
ADDRESS = re.compile(rf"{PREFIX}{NAME}(?:/(?P<inside>.+))?")
TIMEOUT = 10.0  # seconds, for the request that lists a dataset's files
PART = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.\w+)")


class Wording(NamedTuple):
    """What a user is told whom the hub refuses, and one whose HF_HUB_OFFLINE is set; {page} is the dataset's."""

    refused: str
    offline: str


READING = Wording(
    "access is restricted; ask for it at {page}, then run `hf auth login` or set HF_TOKEN",
    "not whole in the hub's cache, and HF_HUB_OFFLINE is set: unset it, or fetch the data first",
)


class Listing(NamedTuple):
    """The paths of a dataset at one commit."""

    commit: str
    files: list[str]


def hub_files(address: str, *, split: str | None = None, subset: str | None = None) -> list[str]:
    """The local copies of the data files that `hf://datasets/ORG/NAME[@REVISION][/PATH]`, or ORG/NAME, means.

    PATH is a file, a folder or a glob pattern. Without it the dataset's card or the names of its files say which belong
    to `split` and `subset`: see `scorer.files.layout.chosen_files`. What is in the hub's cache is not downloaded again.

    Raises ScorerError for what the user has to mend, EngineError where the network or the hub fails.
    """
    found = ADDRESS.fullmatch(address.rstrip("/")) or SHORT.fullmatch(address)
    if found is None:
        raise ScorerError(f"{address}: not an address on the hub; write {PREFIX}ORG/NAME[@REVISION][/PATH]")
    name, revision, inside = found["name"], unquote(found["revision"] or "") or None, found.groupdict().get("inside")
    with hub_errors(address, name, revision):
        listing = _listing(name, revision)
        files = _wanted(address, name, inside, listing, split, subset)
        # By its branch too: the cache notes then which commit that is, for when there is no network.
        _download(name, files[0], revision or "main")
        return [_download(name, file, listing.commit) for file in files]


def _wanted(
    address: str, name: str, inside: str | None, listing: Listing, split: str | None, subset: str | None
) -> list[str]:
    """The paths, in the dataset, of the files that an address means."""
    files = listing.files
    if inside is not None:
        files = matching(inside, files)
        if not files:
            raise ScorerError(f"{address}: the dataset has no such file; see {page_of(name)}")
        if inside in files or is_pattern(inside):
            if split is not None or subset is not None:
                raise ScorerError(f"{address}: names the files itself: leave out --split and --subset")
            return files
    has_card = inside is None and CARD in files
    card = read_card(Path(_download(name, CARD, listing.commit))) if has_card else {}
    files = chosen_files(address, files, card, split=split, subset=subset)
    _check_whole(address, files)
    return files


def _check_whole(address: str, files: list[str]) -> None:
    """Raise ScorerError where files named "-00000-of-00005" are fewer than five: a cache may hold some only."""
    parts = Counter(match.groups() for file in files if (match := PART.fullmatch(file)))
    for (stem, total, suffix), count in parts.items():
        if count != int(total):
            held = f"{count} of the {int(total)} files {stem}-*{suffix} are there"
            raise ScorerError(f"{address}: {held}; run it without HF_HUB_OFFLINE, or name the files")


def _listing(name: str, revision: str | None) -> Listing:
    """The files on the hub; with HF_HUB_OFFLINE set, those in its cache."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
        files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        return Listing(folder.name, sorted(files))
    info = HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT)
    return Listing(info.sha or revision or "main", [file.rfilename for file in info.siblings or ()])


def _download(name: str, file: str, revision: str) -> str:
    from huggingface_hub import hf_hub_download

    return os.fspath(hf_hub_download(name, file, repo_type="dataset", revision=revision))


def page_of(name: str) -> str:
    """The web page of a dataset."""
    return f"https://huggingface.co/datasets/{name}"


@contextmanager
def hub_errors(address: str, name: str, revision: str | None, wording: Wording = READING) -> Iterator[None]:
    """Turn the errors of huggingface_hub into ScorerError, or EngineError where the network or the hub fails."""
    from huggingface_hub import constants, errors

    page = page_of(name)
    refused = f"{address}: {wording.refused.format(page=page)}"
    here = "" if address.startswith(SCHEME) else "no such file or folder here, and "
    try:
        yield
    except (errors.GatedRepoError, errors.LocalTokenNotFoundError) as error:
        raise ScorerError(refused) from error
    except errors.RevisionNotFoundError as error:
        raise ScorerError(f"{address}: the dataset has no revision '{revision}'; see {page}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        unknown = "no such dataset on the hub (if it is private there, run `hf auth login` or set HF_TOKEN)"
        raise ScorerError(f"{address}: {here}{unknown}") from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            said = " ".join((error.server_message or "").split())[:200]
            raise ScorerError(f"{refused} (the hub says: {said})" if said else refused) from error
        raise EngineError(f"{address}: the hub fails ({one_line(error)}); run it again later") from error
    # HTTPError is that of the hub's HTTP client; a RuntimeError is how its transfers of large files fail.
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        if constants.HF_HUB_OFFLINE:
            raise ScorerError(f"{address}: {here}{wording.offline}") from error
        problem = f"the hub can't be reached ({one_line(error)})"
        raise EngineError(f"{address}: {here}{problem}; check the network and HF_ENDPOINT") from error
