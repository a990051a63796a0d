"""Which models the packed engine runs: what a configuration says beforehand, and what a loaded model proves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from scorer_kernels import Head
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from scorer.engines.reference import span_sums
from scorer.engines.spans import BatchOutOfMemoryError, convert_errors
from scorer.faults import one_line
from scorer.models.find import ModelFiles, model_settings
from scorer.tokens import Array, TokenBatch, bounds_of
from scorer.types import EngineError, ScorerError

# Settings of transformers' configurations that change the logits.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAP = "final_logit_softcapping"
LAYER_TYPES = ("attention", "full_attention", "sliding_attention", "chunked_attention")
WINDOW = re.compile("(window|window_size|chunk_size)$")  # settings that limit how far back attention reaches

LENGTHS = (16, 9, 5, 2)  # tokens of the four sequences of the proof
# The mean difference, in nats a token, by which packed and reference may differ. SmolLM2's are 7e-6, 0.003 and 0.02; in
# bfloat16 a scale of attention that is 10% off makes 0.33, and sequences that see each other 1.2.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.3}
NO_MEMORY = "no memory is left to run it in"


def why_not_packed(files: ModelFiles) -> str | None:
    """Why the packed engine can't run this architecture; None where it may, if the model's `Proof` finds no fault."""
    settings = model_settings(files)
    kind = settings.get("model_type")
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if name is None:
        return f"its architecture is {kind}, which transformers {transformers.__version__} does not know"
    if kind == "falcon":
        from scorer.engines.falcon import register

        register()
    elif not getattr(transformers, name)._supports_attention_backend:
        return f"its architecture is {kind}, whose attention can't be replaced in transformers"
    if settings.get("alibi"):
        return "its attention is biased by position (ALiBi)"
    if others := sorted(set(settings.get("layer_types") or ()) - set(LAYER_TYPES)):
        return f"some of its layers are {others[0]}, and may see more than their own sequence"
    return None


def check_packable(files: ModelFiles) -> None:
    """Raise ScorerError where the packed engine can't run this architecture."""
    if reason := why_not_packed(files):
        raise not_packed(files, reason)


def not_packed(files: ModelFiles, reason: str) -> ScorerError:
    """The error for a model that the packed engine can't run."""
    return ScorerError(f"the packed engine can't run {files.name}: {reason}; use --engine vllm, or --engine reference")


def head_of(model: Any) -> Head:
    """The map from hidden states to logits."""
    settings = model.config.get_text_config()
    scale = math.prod(getattr(settings, name, None) or 1.0 for name in MULTIPLIERS)
    scale /= math.prod(getattr(settings, name, None) or 1.0 for name in DIVISORS)
    output = model.get_output_embeddings()
    return Head(output.weight, output.bias, scale, getattr(settings, SOFTCAP, None))


def blocks_of(model: Any) -> Iterable[torch.nn.Module]:
    """The model's blocks, which it runs one after the other."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList))
    return next((blocks for blocks in lists if len(blocks) == count), ())


class Proof:
    """Four short random sequences and the reference engine's NLL of each of their tokens.

    One sequence is longer than the model's attention window, if that is less than `max_length` tokens. Raises
    ScorerError, with the reason as its text, where the model can't be run in parts or fails.
    """

    def __init__(self, model: Any, max_length: int):
        if model.base_model is model:
            raise ScorerError("its hidden states can't be had without its logits")
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.tolerance = TOLERANCE[model.dtype]
        settings = model.config.get_text_config().to_dict()
        windows = (settings[name] for name in settings if WINDOW.search(name))
        beyond = [window + LENGTHS[0] for window in windows if isinstance(window, int) and 0 < window < max_length]
        self.batch = self._random_batch(np.array([max((LENGTHS[0], *beyond)), *LENGTHS[1:]]))
        try:
            with _attention(model, "eager"), convert_errors():
                sums = [span_sums(model, self.batch, sequence) for sequence in range(len(self.batch))]
        except BatchOutOfMemoryError as error:
            raise EngineError(NO_MEMORY) from error
        self.reference = np.concatenate(sums)

    def _random_batch(self, lengths: Array) -> TokenBatch:
        """Sequences of random tokens, with a span for each token but the first."""
        ids = np.random.default_rng(0).integers(0, self.vocab_size, lengths.sum()).astype(np.int32)
        index = np.arange(len(lengths))
        views, starts = np.zeros(len(lengths), np.uint8), np.ones(len(lengths), np.int64)
        return TokenBatch(ids, bounds_of(lengths), index, index, index, views, starts, lengths).by_token()

    def fault(self, score: Callable[[TokenBatch], Array]) -> str | None:
        """Why an engine's scores of the model are wrong; None where they are right.

        They are right where they equal the reference engine's, and where those of every second sequence stay the same
        when the tokens of the others change. score: the NLL sum of each span of a batch, float64 [S].
        """
        changed = np.repeat(np.arange(len(self.batch)) % 2 == 0, self.batch.lengths)
        other_ids = (self.batch.token_ids + changed).astype(np.int32) % self.vocab_size
        try:
            scores, beside_others = score(self.batch), score(replace(self.batch, token_ids=other_ids))
        except ScorerError as error:
            return str(error)
        except (AttributeError, KeyError, TypeError) as error:
            return one_line(error)
        if (difference := _mean_difference(scores, self.reference)) > self.tolerance:
            return f"its scores of random tokens differ from the reference engine's by {difference:.2g} nats a token"
        same = self.batch.sequences % 2 == 1
        if (difference := _mean_difference(scores[same], beside_others[same])) > self.tolerance / 10:
            return f"its scores change by {difference:.2g} nats a token with what else is in a batch"
        return None


def _mean_difference(some: Array, others: Array) -> float:
    """The mean difference where both are finite; infinite where only one is."""
    finite = np.isfinite(some)
    if (finite != np.isfinite(others)).any():
        return math.inf
    return float(np.abs(some - others)[finite].mean()) if finite.any() else 0.0


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    """Within, the model computes its attention by another implementation."""
    usual = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = usual
