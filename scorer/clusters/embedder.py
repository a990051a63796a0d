"""Texts -> embeddings of unit length, by any model of sentence-transformers, which is imported when one is loaded.

Knows neither where the texts come from nor what the embeddings are for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from scorer.config import EmbedderConfig
from scorer.engines.packing import padded_batches
from scorer.models.find import ModelFiles
from scorer.models.folders import embedder_modules, weight_files
from scorer.models.load import choose_device
from scorer.models.quiet import loading, quiet
from scorer.types import ScorerError

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]
LAYER = re.compile(r"\.(\d+)\.")  # of a tensor's name the first number is that of its layer
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}  # padded


class Embedder:
    """A sentence-transformers model in float32, with its own pooling, further modules and default prompt.

    Texts are sorted by their number of tokens: with the library's order, by characters, Alpaca takes a quarter more
    tokens with padding. On CPU each core runs its own batches, which is faster than all cores on each batch; but not
    with code that came with the model, which may keep state between calls.
    """

    def __init__(self, files: ModelFiles, config: EmbedderConfig):
        device = choose_device(config.device)
        options = {"dtype": torch.float32} | ({} if config.allow_pickle else {"use_safetensors": True})
        with loading(files.path):
            if not config.trust_remote_code:
                _check_no_foreign_code(files.path)
            from sentence_transformers import SentenceTransformer

            self.model = SentenceTransformer(
                str(files.path),
                device=device,
                local_files_only=True,
                trust_remote_code=config.trust_remote_code,
                model_kwargs=options,
            )
            for (kind, path), module in zip(embedder_modules(files.path), self.model, strict=True):
                if kind == "Transformer":
                    _check_layers(weight_files(path, config.allow_pickle), module)
            _limit(self.model[0], config.max_tokens)
            # The first call sets options of the tokenizer, which is not safe in several threads.
            self.width = len(self.model.encode("a", show_progress_bar=False))
        self.settings = {  # what changes the numbers, for the manifest
            "prompt": self.model.prompts.get(self.model.default_prompt_name),
            "sentence_transformers": version("sentence-transformers"),
        }
        self.batch_tokens = BATCH_TOKENS[device]
        self.workers = torch.get_num_threads() if device == "cpu" and not config.trust_remote_code else 1
        self.tokens = 0  # embedded so far, without those of the prompt

    def embed(self, texts: Sequence[str]) -> Matrix:
        """float32 [len(texts), D], each row of unit length, or zeros for an empty text."""
        matrix = np.zeros((len(texts), self.width), dtype=np.float32)
        with quiet():
            lengths = self._lengths(texts)
        self.tokens += sum(lengths)
        filled = {i: length for i, length in enumerate(lengths) if length}
        batches = list(padded_batches(filled, self.batch_tokens))
        threads = torch.get_num_threads()  # a thread's own setting, in part the process's
        pool = ThreadPoolExecutor(
            self.workers, "scorer-embed", initializer=torch.set_num_threads, initargs=(max(1, threads // self.workers),)
        )
        try:
            with quiet(), pool:
                made = pool.map(self._encode, ([texts[i] for i in batch] for batch in batches))
                for batch, embeddings in zip(batches, made, strict=True):
                    matrix[batch] = embeddings
        finally:
            torch.set_num_threads(threads)
        return matrix

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, 0 if it is empty; guessed from characters if the model has no mask."""
        filled = [text for text in texts if text]
        mask = self.model.preprocess(filled).get("attention_mask") if filled else None
        counts = iter(mask.sum(1).tolist() if mask is not None else [1 + len(text) // 4 for text in filled])
        return [next(counts) if text else 0 for text in texts]

    def _encode(self, texts: list[str]) -> Matrix:
        rows: Matrix = self.model.encode(
            texts, batch_size=len(texts), show_progress_bar=False, normalize_embeddings=True
        )
        return rows


def _limit(first: Any, max_tokens: int) -> None:
    """Make the first module of a model truncate texts to `max_tokens`."""
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    for module in [route[0] for route in first.sub_modules.values()] if isinstance(first, Router) else [first]:
        if isinstance(module, StaticEmbedding):  # it has no limit of its own
            module.tokenizer.enable_truncation(max_tokens)
        else:
            module.max_seq_length = min(max_tokens, getattr(module, "max_seq_length", None) or max_tokens)


def _check_layers(weights: Sequence[Path], module: Any) -> None:
    """Raise ScorerError where safetensors have other layers than the network, which would make them up or ignore them.

    Their other tensors may differ, as those of a head that is not used for embeddings.
    """
    names: list[str] = []
    for path in weights:
        if path.suffix != ".safetensors":
            return
        with safe_open(path, "pt") as file:
            names += file.keys()
    stored, own = (
        {match[1] for name in some if (match := LAYER.search(name))} for some in (names, module.state_dict())
    )
    if stored != own:
        raise ScorerError(f"{weights[0].parent}: config.json has {len(own)} layers, the weights have {len(stored)}")


def _check_no_foreign_code(folder: Path) -> None:
    """Raise ScorerError where the model brings its own module, or an activation that would be replaced by tanh."""
    foreign = [kind[1:] for kind, _ in embedder_modules(folder) if kind.startswith(".")]
    for path in sorted(folder.rglob("config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "in_features" in config:  # a Dense module
            foreign.append(config.get("activation_function", "torch."))
    if code := [name for name in foreign if not name.startswith("torch.")]:
        raise ScorerError(
            f"{folder} needs {code[0]}, which is not part of sentence-transformers or torch; "
            "give --trust-remote-code if you trust the model's own code"
        )
