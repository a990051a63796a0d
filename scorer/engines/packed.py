"""The default engine: a transformers backbone over padding-free batches, and a head for the scored states alone.

Knows transformers' model families and how a device is kept busy; nothing of records, files or formulas.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from scorer_kernels import nll_head

from scorer.config import ScoreConfig
from scorer.engines.attention import NAME as ATTENTION
from scorer.engines.attention import Layout
from scorer.engines.packing import PackedBatch, pack, plan_batches
from scorer.models import ModelFiles, load_causal_lm
from scorer.types import EngineError, RowStatus, ScorerError, SpanNLL, TokenSequence

# Families whose attention goes through transformers' AttentionInterface with nothing of its own beside it, and whose
# output is the plain product of the last hidden state with the head's weight.
FAMILIES = ("gpt2", "opt", "llama", "qwen2", "qwen3")
# What changes a family's attention in a way that packing leaves out.
UNPACKABLE_SETTINGS = ("use_sliding_window", "reorder_and_upcast_attn", "add_cross_attention")


class PackedEngine:
    """The contract of `scorer.engines.Engine`, batched. Raises ScorerError for a model that it can't pack.

    On CPU each core runs batches of its own, single-threaded: small operations scale with the cores, and none waits
    for the slowest core. On CUDA one thread lays out the next batch while the other's runs.
    """

    def __init__(self, config: ScoreConfig, files: ModelFiles):
        assert config.batch_tokens is not None
        refuse_unpackable(files)
        self.batch_tokens = config.batch_tokens
        self.model = load_causal_lm(
            files,
            dtype=config.dtype,
            device=config.device,
            attn_implementation=ATTENTION,
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
        )
        self.head = self.model.get_output_embeddings()
        self.device = self.model.device
        self.threads = torch.get_num_threads()
        self.workers = self.threads if self.device.type == "cpu" else 2
        self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="scorer-packed")

    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[list[SpanNLL]]:
        """The spans of each batch as it is done."""
        batches = plan_batches(sequences, self.batch_tokens, self.workers)
        pending: deque[Future[list[SpanNLL]]] = deque()
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            for batch in batches:
                pending.append(self.pool.submit(self._score_batch, batch))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            if self.device.type == "cpu":
                torch.set_num_threads(self.threads)

    def _score_batch(self, sequences: Sequence[TokenSequence]) -> list[SpanNLL]:
        """Score a batch; where it does not fit in memory, its halves."""
        try:
            batch = pack(sequences)
            return self._spans(batch, self._forward(batch))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise EngineError(f"the model failed on a batch: {error}") from error
        if len(sequences) == 1:
            (sequence,) = sequences
            return [
                SpanNLL(sequence.record_id, span.turn, sequence.view, None, span.end - span.start, RowStatus.OOM)
                for span in sequence.targets
            ]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(sequences) // 2
        return self._score_batch(sequences[:half]) + self._score_batch(sequences[half:])

    @torch.inference_mode()
    def _forward(self, batch: PackedBatch) -> torch.Tensor:
        """The NLL sum of each span of a batch: float64 [S], on the CPU."""
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # the setting is each thread's own
        states = self.model.base_model(
            input_ids=batch.input_ids[None].to(self.device, non_blocking=True),
            position_ids=batch.position_ids[None].to(self.device, non_blocking=True),
            use_cache=False,
            scorer_layout=Layout(batch.lengths, self.device, self.model.dtype),
        ).last_hidden_state[0]
        rows = states.index_select(0, batch.rows.to(self.device, non_blocking=True))
        nll = nll_head(rows, self.head.weight, batch.targets.to(self.device, non_blocking=True), bias=self.head.bias)
        sums = torch.segment_reduce(nll.double(), "sum", lengths=batch.span_tokens.to(self.device))
        if self.device.type == "cpu":
            return sums
        sums = sums.to("cpu", non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        done.synchronize()  # waits for this batch alone, and not for what the other thread launched since
        return sums

    def _spans(self, batch: PackedBatch, sums: torch.Tensor) -> list[SpanNLL]:
        spans = []
        for (sequence, span), nll in zip(batch.spans, sums.tolist(), strict=True):
            finite = math.isfinite(nll)
            status = RowStatus.OK if finite else RowStatus.NON_FINITE
            total = nll if finite else None
            spans.append(SpanNLL(sequence.record_id, span.turn, sequence.view, total, span.end - span.start, status))
        return spans

    def close(self) -> None:
        """Wait for running batches, and free the model."""
        self.pool.shutdown(cancel_futures=True)
        del self.model, self.head


def refuse_unpackable(files: ModelFiles) -> None:
    """Raise ScorerError unless the packed engine runs this architecture exactly; the error names `reference`."""
    settings = json.loads((files.path / "config.json").read_text(encoding="utf-8"))
    reason = ""
    if settings.get("model_type") not in FAMILIES:
        reason = f"its architecture is {settings.get('model_type')}, not one of {', '.join(FAMILIES)}"
    elif switched := [key for key in UNPACKABLE_SETTINGS if settings.get(key)]:
        reason = f"its configuration sets {switched[0]}"
    if reason:
        raise ScorerError(f"the packed engine can't run {files.name}: {reason}; use --engine reference")


def _out_of_memory(error: BaseException) -> bool:
    # On CPU torch raises a plain RuntimeError; its allocator's name is the only mark.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
