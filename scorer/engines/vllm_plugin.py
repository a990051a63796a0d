"""What vLLM loads in each of its processes: for each causal language model it knows, a variant that scores spans.

The variant is the model's own class with a pooler in the place of sampling: the hidden states that predict a scored
token, of all requests of a step, go through the fused head together, and each request gets one row of sums. Knows
vLLM's models and steps; nothing of records, files or formulas.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scorer_kernels import merge_nll_partials, nll_head, nll_partials, nll_sums
from vllm import ModelRegistry, PoolingParams
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate

PREFIX = "Scoring"  # LlamaForCausalLM is registered a second time, as ScoringLlamaForCausalLM
SUFFIXES = ("ForCausalLM", "LMHeadModel")  # of the classes in vLLM's registry that are causal language models
# In PoolingParams.extra_kwargs: [[start, end], ...] of a request, ascending and apart, start >= 1; and the token that
# its last span ends with, if the prompt ends before it.
SPANS, LAST = "spans", "last"
PROBED_ROWS = 8


def register() -> None:
    """The entry point of `vllm.general_plugins`: registers the variants, by name. May be called again."""
    known = set(ModelRegistry.get_supported_archs())
    for architecture in known:
        name = PREFIX + architecture
        if architecture.endswith(SUFFIXES) and not architecture.startswith(PREFIX) and name not in known:
            ModelRegistry.register_model(name, f"{__name__}:{name}")


def request(token_ids: Sequence[int], spans: Sequence[Sequence[int]]) -> tuple[dict[str, Any], PoolingParams]:
    """What vLLM is asked, to score spans [start, end) of a sequence: a prompt, and what its pooler is told.

    The last token scored predicts nothing that is, so it is not in the prompt: a token a sequence is not computed.
    """
    end = spans[-1][1] - 1
    extra = {SPANS: [list(span) for span in spans], LAST: token_ids[end]}
    return {"type": "token", "prompt_token_ids": token_ids[:end]}, PoolingParams(task="plugin", extra_kwargs=extra)


def __getattr__(name: str) -> type:
    """The variant that vLLM asks for by its registered name, made from the class in vLLM's registry."""
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
class Step:
    """Which hidden states of a step predict a scored token, and where the sums go. All arrays are int64.

    rows [N]: of the step's hidden states. requests, positions [N]: whose, and at which index of its prompt, the token
    is that they predict. offsets [S + 1]: the spans' bounds in these. slots [S]: the spans' places in the result, of
    `shape` R requests and W places each.
    """

    rows: np.ndarray
    requests: np.ndarray
    positions: np.ndarray
    offsets: np.ndarray
    slots: np.ndarray
    shape: tuple[int, int]


def lay_out(spans: Sequence[Sequence[Sequence[int]]], scheduled: np.ndarray, seen: np.ndarray) -> Step:
    """The step of requests whose prompts are computed up to `seen` [R] tokens, the last `scheduled` [R] of them now.

    A span that lies across two steps is scored in parts, each in the step that has its hidden states.
    """
    scheduled, seen = scheduled.astype(np.int64), seen.astype(np.int64)
    counts = np.fromiter(map(len, spans), np.int64, len(spans))
    width = max(int(counts.max(initial=0)), 1)
    request = np.repeat(np.arange(len(spans)), counts)
    slots = request * width + np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    bounds = np.array([span for own in spans for span in own], np.int64).reshape(-1, 2)
    begin = (seen - scheduled)[request]  # the first position of this step
    low = np.maximum(bounds[:, 0] - 1, begin)  # token p + 1 is predicted at position p
    lengths = np.maximum(np.minimum(bounds[:, 1] - 1, seen[request]) - low, 0)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    steps = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    first = (np.cumsum(scheduled) - scheduled)[request]
    rows = np.repeat(first + low - begin, lengths) + steps
    positions = np.repeat(low + 1, lengths) + steps
    return Step(rows, np.repeat(request, lengths), positions, offsets, slots, (len(spans), width))


def predicted(metadata: Any, step: Step, lengths: np.ndarray) -> np.ndarray:
    """The tokens [N] that the step's rows predict, int64: of prompts of `lengths` [R], or the token after one."""
    ids = metadata.prompt_token_ids_cpu.numpy()
    last = np.array([(params.extra_kwargs or {}).get(LAST, 0) for params in metadata.pooling_params], np.int64)
    inside = step.positions < lengths[step.requests]
    return np.where(inside, ids[step.requests, step.positions * inside], last[step.requests])


@dataclass(frozen=True, slots=True)
class Head:
    """This rank's slice of a model's last product, and what its logits go through after it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None
    vocab_start: int
    ranks: int

    @classmethod
    def of(cls, model: Any, like: torch.Tensor) -> Head:
        """The head that `model` has for hidden states `like` these, as seen in its own computation of logits.

        Raises RuntimeError where the logits come otherwise than by this head: nothing is scored with a wrong one.
        """
        # not vLLM's own: those of its warm-up may be anything
        hidden = torch.randn(PROBED_ROWS, like.shape[1], generator=torch.Generator().manual_seed(0)).to(like)
        calls: list[dict[str, Any]] = []
        name = type(model).__name__.removeprefix(PREFIX)
        processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        if len(processors) != 1:
            raise RuntimeError(f"{name} has {len(processors)} logits processors, so it can't be scored")

        def watch(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            names = ("lm_head", "hidden_states", "embedding_bias")
            calls.append(dict(zip(names, args, strict=False)) | options)

        hook = processors[0].register_forward_pre_hook(watch, with_kwargs=True)
        try:
            logits = model.compute_logits(hidden)
        finally:
            hook.remove()
        if len(calls) != 1:
            raise RuntimeError(f"{name} computes its logits in {len(calls)} calls, so it can't be scored")
        layer, bias = calls[0]["lm_head"], calls[0].get("embedding_bias")
        own = layer.shard_indices
        weight = getattr(layer, "weight", None)
        if weight is None or weight.dtype != hidden.dtype or weight.shape[1] != hidden.shape[1]:
            raise RuntimeError(
                f"{name} has a quantized or widened head ({type(layer).__name__}), which can't be scored"
            )
        words = own.org_vocab_end_index - own.org_vocab_start_index  # what follows is padding
        scale, cap = processors[0].scale, processors[0].soft_cap
        head = cls(
            weight[:words],
            None if bias is None else bias[:words] * scale,  # vLLM adds the bias and caps first, and scales then;
            scale,
            None if cap is None else cap * scale,  # the kernel scales, adds and caps
            own.org_vocab_start_index,
            layer.tp_size,
        )
        targets = torch.arange(len(hidden), device=hidden.device)
        nll = head.nll(hidden, targets)  # on every rank, even where the logits are gathered on one
        if logits is not None:
            expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            rounding = 8 * torch.finfo(hidden.dtype).eps * float(logits.abs().max()) + 1e-3
            if not float((nll - expected).abs().max()) <= rounding:
                raise RuntimeError(f"{name} computes its logits in a way that is not known here, so it can't be scored")
        return head

    def nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-log p of `targets` [N] after `hidden` [N, D], float32 [N]. Every rank calls it, and has the result."""
        options: dict[str, Any] = {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}
        if self.ranks == 1:
            return nll_head(hidden, self.weight, targets, **options)
        own = nll_partials(hidden, self.weight, targets, vocab_start=self.vocab_start, **options)
        return merge_nll_partials(tensor_model_parallel_all_gather(own[None], dim=0))


class ScoringPooler(Pooler):  # type: ignore[misc]  # vLLM is not type-checked
    """One row a request: float64 [R, W, 2], the NLL sum in nats and the token count of each of its spans."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = weakref.ref(model)  # and not a submodule: the model holds the pooler
        self.head: Head | None = None

    def get_supported_tasks(self) -> set[str]:
        return {"plugin"}

    def get_pooling_updates(self, task: str) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> torch.Tensor:
        """The rows of this step's requests; an unfinished one's, of a chunked prefill, is kept and added to."""
        if self.head is None:
            self.head = Head.of(self.model(), hidden_states)
        lengths = pooling_metadata.prompt_lens.tolist()
        spans = [
            # A request of vLLM's own warm-up has no spans, and should take as much memory as any.
            params.extra_kwargs[SPANS] if params.extra_kwargs else [[1, length]]
            for params, length in zip(pooling_metadata.pooling_params, lengths, strict=True)
        ]
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled, seen = cursor.num_scheduled_tokens_cpu.numpy(), cursor.seq_lens_cpu.numpy()
        step = lay_out(spans, scheduled, seen)
        words = predicted(pooling_metadata, step, np.asarray(lengths))
        result = self._sums(hidden_states, step, words)
        for i in np.flatnonzero(scheduled != lengths):
            parts, own = pooling_metadata.pooling_states[i].hidden_states_cache, result[i, : len(spans[i])]
            if seen[i] == scheduled[i]:
                parts.clear()  # the first part, and of a preempted request not for the first time
            parts.append(own.clone())
            if seen[i] == lengths[i]:
                own.copy_(torch.stack(parts).sum(0))
                parts.clear()
        return result

    def _sums(self, hidden: torch.Tensor, step: Step, words: np.ndarray) -> torch.Tensor:
        """float64 [R, W, 2], zeros where a request has fewer spans than others. Nothing here waits for the device."""
        assert self.head is not None
        arrays = (step.rows, words, step.offsets, step.slots)
        indices = torch.from_numpy(np.concatenate(arrays))
        if hidden.is_cuda:
            indices = indices.pin_memory().to(hidden.device, non_blocking=True)
        rows, targets, offsets, slots = torch.split(indices, [len(array) for array in arrays])
        sums = nll_sums(self.head.nll(hidden.index_select(0, rows), targets), offsets)
        result = torch.zeros(*step.shape, 2, dtype=torch.float64, device=hidden.device)
        result.view(-1, 2).index_copy_(0, slots, torch.stack((sums, offsets.diff().double()), 1))
        return result
