"""vLLM's plugin: for each causal language model that vLLM knows, a variant that scores spans.

The variant is the model's own class with a pooler in place of sampling: the hidden states that predict a scored token,
of all requests of a step, go through the fused head together, and each request gets one row of sums. vLLM loads this
module in each of its processes.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Thread
from typing import Any

import numpy as np
import torch
from scorer_kernels import Head, merge_nll_partials, nll_head, nll_partials, nll_sums
from vllm import ModelRegistry, PoolingParams
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate

from scorer.tokens import bounds_of, ranges

PREFIX = "Scoring"  # LlamaForCausalLM is registered a second time, as ScoringLlamaForCausalLM
SUFFIXES = ("ForCausalLM", "LMHeadModel")  # the names of causal language models in vLLM's registry end in these
# Keys of PoolingParams.extra_kwargs: the [start, end] of each span of a request, ascending and disjoint, start >= 1;
# and the last token of the last span, which the prompt leaves out.
SPANS, LAST_TOKEN = "spans", "last"
PROBE_ROWS = 8
OWNER = "SCORER_VLLM_OWNER"  # environment variable: the id of the process that starts vLLM


def register() -> None:
    """Register the variants by name: the entry point of `vllm.general_plugins`. May be called again."""
    end_with_parent()
    known = set(ModelRegistry.get_supported_archs())
    for architecture in known:
        name = PREFIX + architecture
        if architecture.endswith(SUFFIXES) and not architecture.startswith(PREFIX) and name not in known:
            ModelRegistry.register_model(name, f"{__name__}:{name}")


@cache
def end_with_parent() -> None:
    """In a process that vLLM started for us: end when its parent does, and quickly.

    vLLM's own engine outlives a kill -9 of the parent. An exit takes two seconds where Python looks for garbage in all
    that is loaded.
    """
    parent = multiprocessing.parent_process()
    if parent is None or os.environ.get(OWNER) in (None, str(os.getpid())):
        return  # a process of the user's

    atexit.register(gc.freeze)

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True, name="scorer-vllm-parent").start()


class _ScoringParams(PoolingParams):  # type: ignore[misc]  # a class of vLLM's
    """Parameters of one request only, of which vLLM needs no copy of its own: a deep one takes 6 µs."""

    def clone(self) -> _ScoringParams:
        return self


def scoring_request(token_ids: Sequence[int], spans: Sequence[Sequence[int]]) -> tuple[dict[str, Any], PoolingParams]:
    """The prompt and PoolingParams of a request that scores spans [start, end) of a sequence.

    The last scored token predicts no other, so the prompt leaves it out, and its hidden state is not computed.
    """
    end = spans[-1][1] - 1
    extra = {SPANS: [list(span) for span in spans], LAST_TOKEN: token_ids[end]}
    return {"type": "token", "prompt_token_ids": token_ids[:end]}, _ScoringParams(task="plugin", extra_kwargs=extra)


def __getattr__(name: str) -> type:
    """The variant of a registered name, derived from the class in vLLM's registry."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    original: Any = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()

    class Scoring(original):  # type: ignore[misc]  # a class of vLLM's
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
            self.pooler = ScoringPooler(self)

    Scoring.__name__ = Scoring.__qualname__ = name
    return Scoring


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The hidden states of a step that predict N scored tokens, of S spans of R requests. Arrays are int64.

    rows [N]: indices into the step's hidden states. requests, positions [N]: the request of each predicted token, and
    its index in that prompt. offsets [S + 1]: bounds of the spans in N. slots [S]: flat indices of the spans in a
    result of `shape` (R, W), W being the most spans of a request.
    """

    rows: np.ndarray
    requests: np.ndarray
    positions: np.ndarray
    offsets: np.ndarray
    slots: np.ndarray
    shape: tuple[int, int]


def plan_step(spans: Sequence[Sequence[Sequence[int]]], scheduled: np.ndarray, computed: np.ndarray) -> StepLayout:
    """The layout of a step after which `computed` [R] tokens of each prompt are done, `scheduled` [R] of them in it.

    A span across two steps is scored in parts, each in the step that has its hidden states.
    """
    scheduled, computed = scheduled.astype(np.int64), computed.astype(np.int64)
    counts = np.fromiter(map(len, spans), np.int64, len(spans))
    width = max(int(counts.max(initial=0)), 1)
    request = np.repeat(np.arange(len(spans)), counts)
    slots = ranges(np.arange(len(spans)) * width, counts)
    bounds = np.array([span for own in spans for span in own], np.int64).reshape(-1, 2)
    begin = (computed - scheduled)[request]  # the first position of this step
    low = np.maximum(bounds[:, 0] - 1, begin)  # token p + 1 is predicted at position p
    lengths = np.maximum(np.minimum(bounds[:, 1] - 1, computed[request]) - low, 0)
    first = (np.cumsum(scheduled) - scheduled)[request]
    rows, positions = ranges(first + low - begin, lengths), ranges(low + 1, lengths)
    return StepLayout(rows, np.repeat(request, lengths), positions, bounds_of(lengths), slots, (len(spans), width))


def target_tokens(metadata: Any, step: StepLayout, lengths: np.ndarray) -> np.ndarray:
    """The tokens that the step's rows predict, int64 [N]: from prompts of `lengths` [R], or the token after one."""
    ids = metadata.prompt_token_ids_cpu.numpy()
    last = np.array([(params.extra_kwargs or {}).get(LAST_TOKEN, 0) for params in metadata.pooling_params], np.int64)
    inside = step.positions < lengths[step.requests]
    return np.where(inside, ids[step.requests, step.positions * inside], last[step.requests])


@dataclass(frozen=True, slots=True)
class ScoringHead:
    """This rank's slice of a model's head, and the number of ranks that share the vocabulary."""

    head: Head
    ranks: int

    @classmethod
    def of(cls, model: Any, like: torch.Tensor) -> ScoringHead:
        """The head of `model` for hidden states such as `like`, found by observing how the model computes logits.

        Raises RuntimeError where the logits are computed in any other way: a wrong head never scores.
        """
        # random, since the hidden states of vLLM's warm-up may be anything
        hidden = torch.randn(PROBE_ROWS, like.shape[1], generator=torch.Generator().manual_seed(0)).to(like)
        name = type(model).__name__.removeprefix(PREFIX)
        logits, processor, call = _observe_logits(model, name, hidden)
        layer, bias = call["lm_head"], call.get("embedding_bias")
        weight = getattr(layer, "weight", None)
        if weight is None or weight.dtype != hidden.dtype or weight.shape[1] != hidden.shape[1]:
            raise RuntimeError(f"{name} can't be scored: its head ({type(layer).__name__}) is quantized or widened")
        shard, scale, cap = layer.shard_indices, processor.scale, processor.soft_cap
        size = shard.org_vocab_end_index - shard.org_vocab_start_index  # the rest is padding
        head = Head(
            weight[:size],
            # vLLM computes scale * softcap * tanh((hidden @ weight.T + bias) / softcap)
            bias=None if bias is None else bias[:size] * scale,
            scale=scale,
            softcap=None if cap is None else cap * scale,
            vocab_start=shard.org_vocab_start_index,
        )
        found = cls(head, layer.tp_size)
        targets = torch.arange(len(hidden), device=hidden.device)
        nll = found.nll(hidden, targets)  # a collective: on every rank, even where one gathers the logits
        if logits is not None:
            expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            tolerance = 8 * torch.finfo(hidden.dtype).eps * float(logits.abs().max()) + 1e-3
            if not float((nll - expected).abs().max()) <= tolerance:
                raise RuntimeError(f"{name} can't be scored: its logits are not those of its head and logits processor")
        return found

    def nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-log p of `targets` [N] after `hidden` [N, D], float32 [N]. Every rank calls it, and has the result."""
        if self.ranks == 1:
            return nll_head(hidden, self.head, targets)
        own = nll_partials(hidden, self.head, targets)
        return merge_nll_partials(tensor_model_parallel_all_gather(own[None], dim=0))


def _observe_logits(model: Any, name: str, hidden: torch.Tensor) -> tuple[Any, LogitsProcessor, dict[str, Any]]:
    """The logits of `hidden` (None on ranks that do not gather them), the model's LogitsProcessor and its arguments."""
    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    if len(processors) != 1:
        raise RuntimeError(f"{name} can't be scored: it has {len(processors)} logits processors")
    calls: list[dict[str, Any]] = []

    def record(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        names = ("lm_head", "hidden_states", "embedding_bias")
        calls.append(dict(zip(names, args, strict=False)) | options)

    hook = processors[0].register_forward_pre_hook(record, with_kwargs=True)
    try:
        logits = model.compute_logits(hidden)
    finally:
        hook.remove()
    if len(calls) != 1:
        raise RuntimeError(f"{name} can't be scored: it computes its logits in {len(calls)} calls")
    return logits, processors[0], calls[0]


class ScoringPooler(Pooler):  # type: ignore[misc]  # vLLM is not type-checked
    """Pools each request to float64 [W, 2]: the NLL sum in nats and the token count of each of its spans."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = weakref.ref(model)  # not a submodule: the model holds the pooler
        self.head: ScoringHead | None = None

    def get_supported_tasks(self) -> set[str]:
        return {"plugin"}

    def get_pooling_updates(self, task: str) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> torch.Tensor:
        """The sums of this step, float64 [R, W, 2]. Those of an unfinished request (chunked prefill) accumulate."""
        if self.head is None:
            self.head = ScoringHead.of(self.model(), hidden_states)
        lengths = pooling_metadata.prompt_lens.tolist()
        spans = [
            # A request of vLLM's warm-up has no spans; to measure memory, it scores all tokens.
            params.extra_kwargs[SPANS] if params.extra_kwargs else [[1, length]]
            for params, length in zip(pooling_metadata.pooling_params, lengths, strict=True)
        ]
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled, computed = cursor.num_scheduled_tokens_cpu.numpy(), cursor.seq_lens_cpu.numpy()
        step = plan_step(spans, scheduled, computed)
        result = self._sums(hidden_states, step, target_tokens(pooling_metadata, step, np.asarray(lengths)))
        for i in np.flatnonzero(scheduled != lengths):
            parts, own = pooling_metadata.pooling_states[i].hidden_states_cache, result[i, : len(spans[i])]
            if computed[i] == scheduled[i]:
                parts.clear()  # this is the first part; a preempted request starts again
            parts.append(own.clone())
            if computed[i] == lengths[i]:
                own.copy_(torch.stack(parts).sum(0))
                parts.clear()
        return result

    def _sums(self, hidden: torch.Tensor, step: StepLayout, tokens: np.ndarray) -> torch.Tensor:
        """float64 [R, W, 2], zeros where a request has fewer spans than W. Does not synchronise with the device."""
        assert self.head is not None
        arrays = (step.rows, tokens, step.offsets, step.slots)
        indices = torch.from_numpy(np.concatenate(arrays))
        if hidden.is_cuda:
            indices = indices.pin_memory().to(hidden.device, non_blocking=True)
        rows, targets, offsets, slots = torch.split(indices, [len(array) for array in arrays])
        sums = nll_sums(self.head.nll(hidden.index_select(0, rows), targets), offsets)
        result = torch.zeros(*step.shape, 2, dtype=torch.float64, device=hidden.device)
        result.view(-1, 2).index_copy_(0, slots, torch.stack((sums, offsets.diff().double()), 1))
        return result
