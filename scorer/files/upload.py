"""Outputs on the Hugging Face hub: checked before any work, written here, and uploaded when all of them are whole."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from scorer.files.hub import ADDRESS, PREFIX, SCHEME, Wording, hub_errors, page_of
from scorer.files.layout import is_pattern
from scorer.files.writer import FOLDER, RecordWriter, output_kind
from scorer.types import ScorerError

MAIN = "main"
WRITING = Wording(
    "you may not write to {page}: run `hf auth login`, or set HF_TOKEN, with a token that may",
    "HF_HUB_OFFLINE is set: unset it, or write to a file here",
)


class Place(NamedTuple):
    """A dataset of the hub and a branch in it, or a pull request such as refs/pr/1."""

    name: str
    branch: str


def on_hub(path: str | Path) -> bool:
    """Whether an output is an address on the hub."""
    return str(path).startswith(SCHEME)


def canonical(address: str) -> str:
    """The address with its branch, by which two names of one file compare equal."""
    found = ADDRESS.fullmatch(address)
    return address if found is None else f"{PREFIX}{found['name']}@{_branch(found['revision'])}/{found['inside']}"


def check_output(path: str) -> None:
    """Raise ScorerError unless `path` names a file of a known kind, here or on the hub, that the user may write.

    Raises EngineError where the hub can't be reached. Changes nothing there.
    """
    if not on_hub(path):
        RecordWriter(path)
        return
    from huggingface_hub import HfApi, errors

    place, _ = _target(path)
    api = HfApi()
    with hub_errors(path, place.name, place.branch, WRITING):
        try:
            api.auth_check(place.name, repo_type="dataset", write=True)
        except errors.GatedRepoError:  # is a RepositoryNotFoundError too, of a dataset that exists
            raise
        except errors.RepositoryNotFoundError:
            _check_creatable(path, place, api.whoami())
            return
        if place.branch != MAIN:
            refs = api.list_repo_refs(place.name, repo_type="dataset", include_pull_requests=True)
            if place.branch not in {ref.name for ref in refs.branches} | {ref.ref for ref in refs.pull_requests or ()}:
                raise ScorerError(f"{path}: the dataset has no branch '{place.branch}'; make it, or name another")


@contextmanager
def uploading(targets: Sequence[str]) -> Iterator[Mapping[str, Path]]:
    """Yield where to write each of `targets` that is on the hub; upload them when the block ends without error.

    What goes to one branch of a dataset is one commit. A dataset that does not exist is created, as a private one.
    Raises ScorerError where the hub refuses, and EngineError where it can't be reached; both say what is there already.
    """
    places = {target: _target(target) for target in targets if on_hub(target)}
    if not places:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="scorer-") as folder:
        copies = {target: Path(folder, str(i), Path(path).name) for i, (target, (_, path)) in enumerate(places.items())}
        yield copies
        uploaded: list[str] = []
        for place in dict.fromkeys(place for place, _ in places.values()):
            together = [target for target, (other, _) in places.items() if other == place]
            try:
                with hub_errors(together[0], *place, WRITING):
                    _commit(place, {places[target][1]: copies[target] for target in together})
            except ScorerError as error:
                if not uploaded:
                    raise
                raise type(error)(f"{error}; uploaded already: {', '.join(uploaded)}") from error
            uploaded += together


def _commit(place: Place, files: Mapping[str, Path]) -> None:
    """Upload files, by their paths in the dataset, as one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    if not api.repo_exists(place.name, repo_type="dataset"):
        api.create_repo(place.name, repo_type="dataset", private=True, exist_ok=True)
    added = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
    message = f"Write {', '.join(files)} with scorer"
    commit = api.create_commit(place.name, added, repo_type="dataset", revision=place.branch, commit_message=message)
    # A path that the dataset's .gitignore matches is left out of the commit without an error.
    found = api.get_paths_info(place.name, list(files), repo_type="dataset", revision=commit.oid)
    if left_out := files.keys() - {info.path for info in found}:
        raise ScorerError(
            f"{place.name}: uploaded without {', '.join(left_out)}, which its .gitignore has; name another file"
        )


def _target(address: str) -> tuple[Place, str]:
    """The place, and the path in it, that an address means. Raises ScorerError where it is none to write to."""
    if output_kind(address) == FOLDER:
        example = f"{address}best.parquet"
        raise ScorerError(f"{address}: a folder can't be written to the hub; name a file, such as {example}")
    found = ADDRESS.fullmatch(address)
    inside = (found and found["inside"]) or ""
    if found is None or is_pattern(inside) or {"", ".", "..", ".git"} & set(inside.split("/")):
        raise ScorerError(f"{address}: not a file on the hub; write {PREFIX}ORG/NAME[@BRANCH]/PATH.parquet")
    return Place(found["name"], _branch(found["revision"])), inside


def _branch(revision: str | None) -> str:
    return unquote(revision or "") or MAIN


def _check_creatable(address: str, place: Place, user: Mapping[str, Any]) -> None:
    """Raise ScorerError unless the user, as `whoami` describes one, may create the dataset.

    Whether a fine-grained token may shows only when the dataset is created.
    """
    owners = {user["name"], *(group["name"] for group in user.get("orgs", ()))}
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if place.name.partition("/")[0] not in owners or role == "read":
        raise ScorerError(f"{address}: {WRITING.refused.format(page=page_of(place.name))}")
    if place.branch != MAIN:
        raise ScorerError(f"{address}: no such dataset, and a new one has no branch '{place.branch}'; leave it out")
