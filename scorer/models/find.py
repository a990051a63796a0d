"""A model's name -> local files: embedded, in a folder, or on the Hugging Face hub.

huggingface_hub is imported where it is used, so that this module loads in milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from scorer.faults import one_line
from scorer.models.digests import Report, digest
from scorer.models.embedded import EMBEDDED, fetch_embedded, on_disk
from scorer.models.folders import (
    MODEL_FILES,
    PICKLED,
    PICKLED_WEIGHTS,
    SMALL_FILES,
    Wanted,
    check_tokenizer,
    model_files,
    pickled_folders,
    settings_of,
)
from scorer.types import ScorerError

HUB_TIMEOUT = 5.0  # seconds, for the request that looks a name up
HUB_EXAMPLES: Mapping[str, str] = {  # all run in the packed engine
    "gpt2": "124M, the paper's weak model",
    "gpt2-medium": "355M",
    "gpt2-large": "774M",
    "gpt2-xl": "1.6B",
    "facebook/opt-125m": "125M; its weights may be pickled only",
    "facebook/opt-350m": "350M, Small2Large's; its weights may be pickled only",
    "facebook/opt-1.3b": "1.3B, Small2Large's; its weights may be pickled only",
    "HuggingFaceTB/SmolLM2-135M": "135M, base",
    "Qwen/Qwen2.5-0.5B": "0.5B",
    "Qwen/Qwen3-0.6B": "0.6B",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "1.1B",
    "meta-llama/Llama-2-7b-hf": "7B, the paper's strong model; gated",
}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine."""

    name: str
    path: Path  # a folder with config.json, weights and (for scoring) a tokenizer
    revision: str  # identifies the content
    document_token_id: int | None  # the token that separates documents; None: the tokenizer's BOS, else its EOS
    origin: str  # embedded, directory or hub


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A line of the table of known models; `path` and `megabytes` (10^6 bytes) are None unless it is on disk."""

    name: str
    origin: str
    what: str
    path: Path | None
    megabytes: float | None


def find_model(
    name: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    weights: bool = True,
    embedder: bool = False,
    report: Report | None = None,
) -> ModelFiles:
    """The files of an embedded model, a local folder or a hub model, in that order; downloaded if necessary.

    For a folder with the name of an embedded model, write `./name`. A hub model in the local hub cache is used without
    asking the hub. The revision of a folder is a digest of its files, that of a hub model is its commit. weights: False
    for a model that is served elsewhere; a folder may lack them, and they are not downloaded. embedder: the model is
    one of sentence-transformers; it must have a modules.json, which says how token vectors become a sentence vector.

    Raises ScorerError, within seconds, if the name is unknown, if the only weights are pickled and `allow_pickle` is
    False, or if files are missing; also as `fetch_embedded`.
    """
    folder = Path(os.path.expanduser(name))
    wanted = Wanted(allow_pickle, weights, embedder)
    if name not in EMBEDDED and not os.path.isdir(folder):
        return _from_hub(name, revision, wanted, report)
    if revision is not None:
        raise ScorerError(f"--revision is for models of the hub, and {name} is not one: leave it out")
    if name in EMBEDDED:
        model = EMBEDDED[name]
        if embedder and model.context_length is not None:
            raise ScorerError(f"{name} is a language model and embeds no sentences: choose another embedder")
        path = fetch_embedded(name, report)
        wanted.check(path)
        return ModelFiles(name, path, model.revision, model.document_token_id, "embedded")
    wanted.check(folder)
    revision = digest(folder, model_files(folder, deep=embedder), report)
    return ModelFiles(name, Path(os.path.realpath(folder)), revision, None, "directory")


def check_unchanged(files: ModelFiles) -> None:
    """Raise ScorerError if the model's files changed since they were found; those of the hub cache are not checked."""
    if files.origin == "embedded":
        same = on_disk(files.name) is not None
    elif files.origin == "directory":
        same = files.revision == digest(files.path, model_files(files.path))
    else:
        return
    if not same:
        raise ScorerError(f"{files.path}: the model changed while it was used; run it again when nothing writes there")


def model_table() -> list[ModelRow]:
    """The embedded models, then examples from the hub, each with its path and size if it is on this machine."""
    rows = [(m.name, "embedded", m.what, on_disk(m.name)) for m in EMBEDDED.values()]
    rows += [(name, "hub", what, _in_hub_cache(name, None)) for name, what in HUB_EXAMPLES.items()]
    return [ModelRow(*row, _megabytes(row[-1])) for row in rows]


def _megabytes(folder: Path | None) -> float | None:
    return None if folder is None else sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6


def weight_bytes(files: ModelFiles) -> int:
    """The size of the model's weight files."""
    return sum(f.stat().st_size for pattern in ("*.safetensors", PICKLED_WEIGHTS) for f in files.path.glob(pattern))


def model_settings(files: ModelFiles) -> dict[str, Any]:
    """The model's config.json. Raises ScorerError if it can't be read or is not a JSON object."""
    return settings_of(files.path)


def _in_hub_cache(name: str, revision: str | None, file: str = "config.json") -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _from_hub(name: str, revision: str | None, wanted: Wanted, report: Report | None) -> ModelFiles:
    problem: ScorerError | None = None
    with _hub_errors(name, revision):
        path = _in_hub_cache(name, revision, "modules.json" if wanted.embedder else "config.json")
    if path is not None:
        try:
            wanted.check(path)
            if not wanted.embedder:
                check_tokenizer(path)
            return ModelFiles(name, path, path.name, None, "hub")
        except ScorerError as error:  # another program downloaded some of the files only: download the others
            problem = error
    with _hub_errors(name, revision, problem):
        path = _download(name, revision, wanted, report)
    wanted.check(path)
    return ModelFiles(name, path, path.name, None, "hub")


def _download(name: str, revision: str | None, wanted: Wanted, report: Report | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
    files = [PurePosixPath(file.rfilename) for file in info.siblings or ()]
    if wanted.embedder and PurePosixPath("modules.json") not in files:
        raise ScorerError(f"model '{name}': not a sentence-transformers model, which has a modules.json")
    pickled = pickled_folders(files if wanted.embedder else [file for file in files if len(file.parts) == 1])
    if wanted.weights and pickled and not wanted.allow_pickle:
        raise ScorerError(f"model '{name}': {PICKLED}")
    if report:
        report(f"fetching {name} from the hub")
    patterns = [*MODEL_FILES, *([PICKLED_WEIGHTS] if pickled else [])] if wanted.weights else [*SMALL_FILES]
    # Folders hold the modules of an embedder; of other models, the same weights in other formats.
    ignored = None if wanted.embedder else ["*/*"]
    return Path(snapshot_download(name, revision=info.sha, allow_patterns=patterns, ignore_patterns=ignored))


@contextmanager
def _hub_errors(name: str, revision: str | None, problem: ScorerError | None = None) -> Iterator[None]:
    """Turn the errors of huggingface_hub into ScorerError. `problem`: what is wrong with the model in the hub cache."""
    from huggingface_hub import errors

    login = f"model '{name}': accept its licence at https://huggingface.co/{name}, then run `hf auth login`"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ScorerError(login) from error
    except errors.RevisionNotFoundError as error:
        raise ScorerError(f"model '{name}': the hub has no revision '{revision}' of it") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise _unknown(name, "not on the hub (if it is private there, run `hf auth login`)") from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ScorerError(login) from error
        raise _unknown(name, f"the hub failed ({one_line(error)})") from error
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # that of the hub's HTTP client
        if problem is not None:
            raise ScorerError(f"{problem}; the hub, which has the rest, cannot be reached") from error
        raise _unknown(name, f"the hub cannot be reached ({one_line(error)})") from error


def _unknown(name: str, hub: str) -> ScorerError:
    return ScorerError(
        f"model '{name}': not a folder, not embedded ({', '.join(EMBEDDED)}), not in the local hub cache, and {hub}; "
        f"names on the hub are such as {', '.join(list(HUB_EXAMPLES)[:5])}"
    )
