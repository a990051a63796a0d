"""The default engine: a transformers backbone over padding-free batches, and a head over the scored states alone."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from scorer_kernels import HeadFunction, nll_head, nll_sums

from scorer.config import ScoreConfig
from scorer.engines.architecture import NO_MEMORY, Proof, blocks_of, check_packable, head_of, not_packed
from scorer.engines.attention import (
    ATTENTION,
    Layout,
    activate_flash_attention_3,
    attention_over,
    restore_flash_attention_2,
)
from scorer.engines.packing import PackedBatch, pack, plan_batches
from scorer.engines.spans import (
    BatchOutOfMemoryError,
    check_token_ids,
    convert_errors,
    no_scores,
    oom_scores,
    with_sums,
)
from scorer.faults import one_line
from scorer.models.find import ModelFiles
from scorer.models.load import load_causal_lm
from scorer.tokens import Array, SpanScores, TokenBatch
from scorer.types import EngineError, ScorerError

CUDA_THREADS = 2  # one packs the next batch while the other's runs


class _Pending(NamedTuple):
    """Sequences that a thread of the pool computes now or later."""

    batch: TokenBatch
    sequences: Array
    scores: Future[SpanScores]


class PackedEngine:
    """The contract of `scorer.engines.Engine`, batched. Raises ScorerError for a model that it can't pack.

    On CPU each core runs batches of its own, single-threaded: small operations scale with the cores, and none waits
    for the slowest core. On CUDA a batch is packed while the one before runs.
    """

    def __init__(self, config: ScoreConfig, files: ModelFiles, head_function: HeadFunction = nll_head):
        assert config.batch_tokens is not None
        check_packable(files)
        self.batch_tokens = config.batch_tokens
        self.model = load_causal_lm(files, config, ATTENTION)
        self.head = head_of(self.model)
        self.head_function = head_function
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        self.device = self.model.device
        hopper = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] == 9
        self.flash_attention_3 = hopper and activate_flash_attention_3()
        self.threads = torch.get_num_threads()
        self.workers = self.threads if self.device.type == "cpu" else CUDA_THREADS
        self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="scorer-packed")
        try:
            self._prove(files, config)
        except BaseException:
            self.close()
            raise

    def score(self, batches: Iterable[TokenBatch | None]) -> Iterator[SpanScores]:
        """Yield the scores of each packed batch when it is done."""
        pending: deque[_Pending] = deque()
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            for batch in batches:
                if batch is None:
                    yield from self._finished(pending)
                    continue
                if not len(batch):
                    yield no_scores(batch)
                pending += self._submit(batch)
                while len(pending) > 2 * self.workers:  # while the caller handles a result, no worker waits
                    yield from self._finished(pending)
            while pending:
                yield from self._finished(pending)
        finally:
            for one in pending:
                one.scores.cancel()
            if self.device.type == "cpu":
                torch.set_num_threads(self.threads)

    def _submit(self, batch: TokenBatch) -> list[_Pending]:
        check_token_ids(batch, self.vocab_size)
        # On CPU the last batches are small, so that the cores end together; a GPU wants them all large.
        cores = self.workers if self.device.type == "cpu" else 1
        parts = plan_batches(batch, self.batch_tokens, cores)
        return [_Pending(batch, part, self.pool.submit(self._score_batch, batch, part)) for part in parts]

    def _finished(self, pending: deque[_Pending]) -> Iterator[SpanScores]:
        """The scores of the first of `pending`. Where it does not fit in memory, all others come first."""
        too_large: list[tuple[TokenBatch, Array]] = []
        while pending:
            batch, sequences, scores = pending.popleft()
            try:
                yield scores.result()
            except BatchOutOfMemoryError:
                too_large.append((batch, sequences))
            del scores  # its error holds the memory of the failed batch
            if not too_large:
                return
        for batch, sequences in too_large:  # no other batch holds memory now
            yield from self.pool.submit(self._score_halves, batch, sequences).result()

    def _score_batch(self, batch: TokenBatch, sequences: Array) -> SpanScores:
        """Raises BatchOutOfMemoryError where the sequences do not fit in memory together."""
        torch.set_num_threads(1)  # the setting is per thread
        with convert_errors():
            packed = pack(batch, sequences)
            return with_sums(batch, packed.spans, self._forward(packed).numpy())

    def _score_halves(self, batch: TokenBatch, sequences: Array) -> list[SpanScores]:
        """Score sequences that did not fit, halved until each part does; one too large by itself gets OOM."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(sequences) // 2
        scores: list[SpanScores] = []
        for part in (sequences[:half], sequences[half:]) if half else (sequences,):
            try:
                scores.append(self._score_batch(batch, part))
                continue
            except BatchOutOfMemoryError:
                pass  # recurse outside this block: the error holds the memory of the failed batch
            scores += self._score_halves(batch, part) if half else [oom_scores(batch, part)]
        return scores

    @torch.inference_mode()
    def _forward(self, batch: PackedBatch) -> torch.Tensor:
        """The NLL sum of each span of a batch: float64 [S], on the CPU."""
        with attention_over(Layout(batch.lengths, self.device, self.model.dtype)):
            states = self.model.base_model(
                input_ids=self._to_device(batch.input_ids)[None],
                position_ids=self._to_device(batch.position_ids)[None],
                use_cache=False,
            ).last_hidden_state[0]
        rows = states.index_select(0, self._to_device(batch.rows))
        nll = self.head_function(rows, self.head, self._to_device(batch.targets))
        sums = nll_sums(nll, self._to_device(batch.offsets))
        if self.device.type == "cpu":
            return sums
        sums = sums.to("cpu", non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        done.synchronize()  # waits for this batch alone, not for later launches of the other thread
        return sums

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on the model's device. Copies to a GPU do not wait: the host's part is in pinned memory."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _prove(self, files: ModelFiles, config: ScoreConfig) -> None:
        """Raise ScorerError where the scores are not the reference engine's; compile the blocks if that works."""
        assert config.max_length is not None
        try:
            proof = Proof(self.model, config.max_length)
        except ScorerError as error:
            raise not_packed(files, str(error)) from error
        reason = proof.fault(self._proof_sums)
        if reason and self.flash_attention_3:
            restore_flash_attention_2(reason)
            reason = proof.fault(self._proof_sums)
        if reason:
            raise not_packed(files, reason)
        if config.compile and (reason := self._compile(proof)):
            logging.getLogger(__name__).warning(f"{files.name} runs without compiled blocks: {reason}")

    def _compile(self, proof: Proof) -> str | None:
        """Compile each block, once for batches of any size. Where that fails, say why, and leave them as they were."""
        blocks = list(blocks_of(self.model))
        try:
            for block in blocks:
                block.compile(dynamic=True)
            reason = proof.fault(self._proof_sums)
        except Exception as error:  # noqa: BLE001 (a compiler may raise anything, and the run can do without)
            reason = one_line(error)
        if reason:
            for block in blocks:
                block._compiled_call_impl = None
        return reason

    def _proof_sums(self, batch: TokenBatch) -> Array:
        """The NLL sum of each span of a batch, float64 [S], all sequences at once. For `Proof`."""
        try:
            scores = self.pool.submit(self._score_batch, batch, np.arange(len(batch))).result()
        except BatchOutOfMemoryError as error:
            raise EngineError(NO_MEMORY) from error
        sums = np.empty(len(scores.spans))
        sums[scores.spans] = scores.nll_sums
        return sums

    def close(self) -> None:
        """Wait for running batches, and free the model."""
        self.pool.shutdown(cancel_futures=True)
        del self.model, self.head
