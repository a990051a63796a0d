"""Which models the packed engine runs: what a configuration says beforehand, and what a loaded model proves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
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
WINDOW = re.compile("(window|window_size|chunk_size)$")  # settings that limit how far back attention reaches

LENGTHS = (16, 9, 5, 2)  # tokens of the four sequences of the proof
# The mean difference, in nats a token, by which packed and reference may differ. SmolLM2's are 5e-6, 0.003 and 0.09; in
# bfloat16 a scale of attention that is 10% off makes 0.35, and sequences that see each other 0.97.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.3}


def why_not_packed(files: ModelFiles) -> str | None:
    """Why the packed engine can't run this architecture; None where it may, if the model passes `check_proof`."""
    kind = model_settings(files).get("model_type")
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if name is None:
        return f"its architecture is {kind}, which transformers {transformers.__version__} does not know"
    if kind == "falcon":
        from scorer.engines.falcon import register

        register()
    elif not getattr(transformers, name)._supports_attention_backend:
        return f"its architecture is {kind}, whose attention can't be replaced in transformers"
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


def proof_batch(model: Any, max_length: int) -> TokenBatch:
    """Four short random sequences, with a span for each token; one is longer than the model's attention window.

    A window of `max_length` tokens or more has no effect.
    """
    settings = model.config.get_text_config().to_dict()
    windows = (settings[name] for name in settings if WINDOW.search(name))
    beyond = [window + LENGTHS[0] for window in windows if isinstance(window, int) and 0 < window < max_length]
    lengths = np.array([max((LENGTHS[0], *beyond)), *LENGTHS[1:]])
    ids = np.random.default_rng(0).integers(0, model.get_input_embeddings().weight.shape[0], lengths.sum())
    count = len(lengths)
    index = np.arange(count)
    zeros = np.zeros(count, np.uint8)
    return TokenBatch(
        ids.astype(np.int32), bounds_of(lengths), index, index, index, zeros, np.ones(count, np.int64), lengths
    ).by_token()


def check_proof(model: Any, batch: TokenBatch, score: Callable[[TokenBatch], Array]) -> str | None:
    """Why the packed engine's scores of `proof_batch` are wrong; None where they are right.

    They are right where they equal the reference engine's, and where those of every second sequence stay the same when
    the tokens of the others change. score: the packed engine's NLL sum of each span, float64 [S].
    """
    if model.base_model is model:
        return "its hidden states can't be had without its logits"
    try:
        ours = score(batch)
        with _attention(model, "eager"), convert_errors():
            reference = np.concatenate([span_sums(model, batch, sequence) for sequence in range(len(batch))])
        beside_others = score(_change_every_second(batch, model.get_input_embeddings().weight.shape[0]))
    except BatchOutOfMemoryError as error:
        raise EngineError(f"{batch.lengths.sum():,} tokens do not fit in memory beside the model") from error
    except ScorerError as error:
        return str(error)
    except (AttributeError, KeyError, TypeError) as error:
        return one_line(error)
    tolerance = TOLERANCE[model.dtype]
    if (difference := _mean_difference(ours, reference)) > tolerance:
        return f"its scores of random tokens differ from the reference engine's by {difference:.2g} nats a token"
    same = batch.sequences % 2 == 1
    if (difference := _mean_difference(ours[same], beside_others[same])) > tolerance / 10:
        return f"its scores change by {difference:.2g} nats a token with what else is in a batch"
    return None


def _change_every_second(batch: TokenBatch, vocab_size: int) -> TokenBatch:
    """The batch with other tokens in its sequences 0, 2, ..."""
    changed = np.repeat(np.arange(len(batch)) % 2 == 0, batch.lengths)
    return replace(batch, token_ids=(batch.token_ids + changed).astype(np.int32) % vocab_size)


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
