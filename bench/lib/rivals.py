"""Stock vLLM behind the contract of `scorer.engines.Engine`, as the rival of `scorer.engines.vllm`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from scorer.config import ScoreConfig
from scorer.engines.spans import with_sums
from scorer.engines.vllm import RESERVED_ARGS, check_vllm, engine_arguments, set_environment, shut_down
from scorer.models.find import ModelFiles
from scorer.tokens import SpanScores, TokenBatch
from scorer.types import ScorerError

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # our engine sets it; stock vLLM chooses by itself
KEPT_ARGS = ("model", "skip_tokenizer_init")  # the RESERVED_ARGS that stock vLLM gets too
PROBE = (1, 2, 3)  # tokens


class WholePrompt:
    """`prompt_logprobs=0` and one generated token; the log-probabilities of the spans are summed here."""

    def __init__(self, llm: Any):
        self.llm = llm

    def score(self, batches: Iterable[TokenBatch | None]) -> Iterator[SpanScores]:
        """Yield the spans of a batch at once, since `LLM.generate` returns all results at once."""
        for batch in filter(None, batches):
            tokens = _token_ids(batch)
            outputs = _generate(self.llm, tokens, [{"prompt_logprobs": 0}] * len(batch))
            sums = [
                -sum(outputs[q].prompt_logprobs[i][tokens[q][i]].logprob for i in range(start, end))
                for q, start, end in _spans(batch)
            ]
            yield with_sums(batch, np.arange(len(sums)), np.array(sums))

    def close(self) -> None:
        """End vLLM's processes."""
        _close(self.llm)


class ResponseOnly:
    """Only the log-probabilities of the response tokens, which not every release of vLLM can compute.

    Raises ScorerError with the reason where this release or its model runner can't. A shared `llm` is closed by the
    first `close`.
    """

    def __init__(self, llm: Any):
        from vllm import SamplingParams

        self.llm = llm
        if not hasattr(SamplingParams, "prompt_logprob_start"):
            raise ScorerError("this release of vLLM has no SamplingParams.prompt_logprob_start")
        from vllm.exceptions import VLLMValidationError

        try:
            _generate(llm, [PROBE], [response_rows(PROBE, 1)])
        except VLLMValidationError as error:
            raise ScorerError(f"vLLM refuses it: {str(error).splitlines()[0]}") from error

    def score(self, batches: Iterable[TokenBatch | None]) -> Iterator[SpanScores]:
        """Yield the spans of a batch at once."""
        for batch in filter(None, batches):
            tokens, firsts = _token_ids(batch), batch.starts[batch.span_offsets[:-1]].tolist()
            options = [response_rows(ids, first) for ids, first in zip(tokens, firsts, strict=True)]
            outputs = _generate(self.llm, tokens, options)
            sums = [
                -float(outputs[q].prompt_token_id_logprobs[start - firsts[q] : end - firsts[q]].sum(dtype="float64"))
                for q, start, end in _spans(batch)
            ]
            yield with_sums(batch, np.arange(len(sums)), np.array(sums))

    def close(self) -> None:
        """End vLLM's processes."""
        _close(self.llm)


def open_stock(config: ScoreConfig, files: ModelFiles) -> Any:
    """vllm.LLM with our engine's arguments, except those that scoring needs, and with the model runner vLLM chooses.

    Chunked prefill has vLLM's default, and max_model_len has room for the one generated token.
    """
    check_vllm()
    set_environment(config)
    from vllm import LLM

    ours = engine_arguments(config, files)
    arguments = {name: value for name, value in ours.items() if name not in RESERVED_ARGS or name in KEPT_ARGS}
    del arguments["enable_chunked_prefill"]
    arguments["max_model_len"] += 1
    with _own_runner():
        return LLM(**arguments)


def _token_ids(batch: TokenBatch) -> list[list[int]]:
    return [batch.ids(sequence).tolist() for sequence in range(len(batch))]


def _spans(batch: TokenBatch) -> Iterator[tuple[int, int, int]]:
    """Sequence, start and end of each span."""
    return zip(batch.sequences.tolist(), batch.starts.tolist(), batch.ends.tolist(), strict=True)


def _generate(llm: Any, token_ids: Sequence[Sequence[int]], options: list[dict[str, Any]]) -> list[Any]:
    """vLLM's outputs in the order of `token_ids`; `options` are the SamplingParams of each."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(ids)} for ids in token_ids]
    params = [SamplingParams(max_tokens=1, temperature=0, detokenize=False, **own) for own in options]
    with _own_runner():
        outputs: list[Any] = llm.generate(prompts, params, use_tqdm=False)
    return outputs


def response_rows(token_ids: Sequence[int], start: int) -> dict[str, Any]:
    """The SamplingParams that score the tokens from `start` on, each predicted by the row before it."""
    return {"prompt_logprob_start": start - 1, "prompt_logprob_token_ids": [[token] for token in token_ids[start:]]}


@contextmanager
def _own_runner() -> Iterator[None]:
    """Let vLLM choose its model runner: it reads the environment when it starts and at every request."""
    saved = os.environ.pop(RUNNER, None)
    try:
        yield
    finally:
        if saved is not None:
            os.environ[RUNNER] = saved


def _close(llm: Any) -> None:
    shut_down(llm.llm_engine)
