"""A model's name -> local files -> tokenizer and network; the choice of dtype and device.

It does not know how an embedded model is had (scorer.embedded), what a model is asked, how its text is made, or how it
is run. torch, transformers and the hub's client are imported where they are used: this module loads in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scorer.config import DEVICES, DTYPES, one_of
from scorer.embedded import EMBEDDED, Report, fetch_embedded, on_disk
from scorer.loading import loading, one_line
from scorer.types import ScorerError

HUB_SECONDS = 5.0  # how long the hub may take to say whether it knows a name
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")  # of a model: all but its weights
MODEL_FILES = (*SMALL_FILES, "*.safetensors")
PICKLED_WEIGHTS = "pytorch_model*.bin*"  # the weights, and the index of sharded ones
PICKLE_HELP = "which can run code when read; give --allow-pickle if you trust them"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
WHOLE_FILE_BYTES = 64 << 20  # up to this size a file counts into a folder's digest with all its bytes


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
    report: Report | None = None,
) -> ModelFiles:
    """The files of an embedded model, a local folder or a hub model, in that order, fetched if need be.

    An embedded name wins over a folder of that name in the working directory: write `./name` for the folder. A folder
    wins over a hub model. A hub model that lies in the local hub cache is used as it is, without asking the hub.
    A folder's revision is `sha256:` and a digest of the names, sizes and contents of its files; of a file over 64 MiB
    the size, the first MiB and the last MiB count. Without `weights` a folder may lack them, and the hub's are not
    fetched: for a model that is served elsewhere. Raises ScorerError, within seconds, if the name is none of these, if
    there are weights in pickle format only and not `allow_pickle`, or if files are missing; see also `fetch_embedded`.
    """
    folder = Path(os.path.expanduser(name))
    if name not in EMBEDDED and not os.path.isdir(folder):
        return _from_hub(name, revision, allow_pickle, weights, report)
    if revision is not None:
        raise ScorerError(f"--revision is for models of the hub, and {name} is not one: leave it out")
    if name in EMBEDDED:
        model = EMBEDDED[name]
        return ModelFiles(name, fetch_embedded(name, report), model.revision, model.document_token_id, "embedded")
    _check_folder(folder, allow_pickle, weights)
    return ModelFiles(name, folder.resolve(), _digest(folder), None, "directory")


def model_table() -> list[ModelRow]:
    """The embedded models, then examples from the hub, with what of them is on this machine."""
    rows = [(m.name, "embedded", f"{m.what}; {m.licence}", on_disk(m.name)) for m in EMBEDDED.values()]
    rows += [(name, "hub", what, _in_hub_cache(name, None)) for name, what in HUB_EXAMPLES.items()]
    return [
        ModelRow(name, origin, what, path, sum(f.stat().st_size for f in _files(path)) / 1e6 if path else None)
        for name, origin, what, path in rows
    ]


def choose_device(device: str) -> str:
    """`cpu` or `cuda`. auto: cuda where torch finds one. Raises ScorerError if cuda is asked for and there is none."""
    import torch

    one_of("device", device, DEVICES)
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ScorerError("device: torch finds no CUDA device here; use --device cpu, or install a CUDA build of torch")
    return ("cuda" if found else "cpu") if device == "auto" else device


def choose_dtype(dtype: str, device: str) -> str:
    """The name of the dtype to compute in. auto: bfloat16 where `device` multiplies it in hardware, else float32.

    Where it is emulated, bfloat16 is slower than float32: on a CPU the instructions themselves are asked for
    (AVX512-BF16, AMX, or ARM's), since oneDNN calls any AVX-512 enough.
    """
    import torch

    one_of("dtype", dtype, DTYPES)
    if dtype != "auto":
        return dtype
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif platform.machine().lower() in ("arm64", "aarch64"):
        onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        fast = onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def weight_bytes(files: ModelFiles) -> int:
    """The size of the model's weights, as they are on disk."""
    return sum(f.stat().st_size for pattern in ("*.safetensors", PICKLED_WEIGHTS) for f in files.path.glob(pattern))


def model_settings(files: ModelFiles) -> dict[str, Any]:
    """The model's config.json. Raises ScorerError where it cannot be read, or holds anything but a JSON object."""
    return _settings(files.path)


def load_tokenizer(files: ModelFiles, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer (transformers). Raises ScorerError if it has none, or one that does not load."""
    _check_tokenizer(files.path)
    with loading(files.path):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(files.path, trust_remote_code=trust_remote_code, local_files_only=True)


def load_causal_lm(
    files: ModelFiles,
    *,
    dtype: str,
    device: str,
    attn_implementation: str,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Any:
    """The causal language model (transformers) in `dtype` on `device`, in eval mode and without gradients.

    Raises ScorerError if it does not load, or if its weights do not fill the whole network: transformers would fill in
    random ones.
    """
    _check_folder(files.path, allow_pickle)
    with loading(files.path):
        import torch
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            files.path,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=any(files.path.glob("model*.safetensors")),
            output_loading_info=True,
        )
        if missing := sorted(info["missing_keys"]):
            raise ScorerError(
                f"{files.path}: {len(missing)} tensors are missing, {missing[0]} the first: "
                f"not a causal language model ({type(model).__name__}), or not all of its files"
            )
        return model.to(device).eval().requires_grad_(False)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ScorerError(f"{folder}: no tokenizer (looked for {', '.join(TOKENIZER_FILES)})")


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of ValueError: not JSON, not UTF-8
        raise ScorerError(f"{path}: cannot be read ({one_line(error)}); copy the model again") from error
    if not isinstance(settings, dict):
        raise ScorerError(f"{path}: not a model's configuration, which is a JSON object; copy the model again")
    return settings


def _check_folder(folder: Path, allow_pickle: bool, weights: bool = True) -> None:
    """Raise ScorerError unless `folder` holds a configuration and (unless not) all weights, in an allowed format."""
    if not (folder / "config.json").is_file():
        raise ScorerError(f"{folder}: no config.json there, so it is not a model's folder")
    _settings(folder)
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


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted({p for pattern in (*MODEL_FILES, PICKLED_WEIGHTS) for p in folder.glob(pattern)}):
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= WHOLE_FILE_BYTES:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                ends = hashlib.sha256(file.read(1 << 20))
                file.seek(-(1 << 20), os.SEEK_END)
                ends.update(file.read())
                content = ends.hexdigest()
        total.update(f"{path.name}\0{size}\0{content}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _in_hub_cache(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _from_hub(name: str, revision: str | None, allow_pickle: bool, weights: bool, report: Report | None) -> ModelFiles:
    from huggingface_hub import HfApi, errors, snapshot_download

    login = f"model '{name}': accept its licence at https://huggingface.co/{name}, then run `hf auth login`"
    problem: ScorerError | None = None  # with what of it lies in the cache
    try:
        if path := _in_hub_cache(name, revision):
            try:
                _check_folder(path, allow_pickle, weights)
                _check_tokenizer(path)
                return ModelFiles(name, path, path.name, None, "hub")
            except ScorerError as error:  # such as a part that another program needed: the hub has the rest
                problem = error
        info = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
        pickled = not any(file.rfilename.endswith(".safetensors") for file in info.siblings or ())
        if weights and pickled and not allow_pickle:
            raise ScorerError(f"model '{name}': its weights are pickled (*.bin), {PICKLE_HELP}")
        if report:
            report(f"fetching {name} from the hub")
        patterns = [*MODEL_FILES, *([PICKLED_WEIGHTS] if pickled else [])] if weights else [*SMALL_FILES]
        # in sub-folders lie other formats of the same weights
        path = Path(snapshot_download(name, revision=info.sha, allow_patterns=patterns, ignore_patterns=["*/*"]))
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
    _check_folder(path, allow_pickle, weights)
    return ModelFiles(name, path, path.name, None, "hub")


def _unknown(name: str, hub: str) -> ScorerError:
    return ScorerError(
        f"model '{name}': not a folder, not embedded ({', '.join(EMBEDDED)}), not in the hub's cache here, and {hub}; "
        f"names on the hub are such as {', '.join(list(HUB_EXAMPLES)[:5])}"
    )
