"""The engine of a remote server: sends token sequences over HTTP to a vLLM server with the routes of vllm_server.py.

Knows the routes, what a right answer is, and when to try again; neither vLLM nor models.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import numpy as np
import orjson

from scorer.background import Background
from scorer.config import DTYPES, ScoreConfig
from scorer.engines.http import (
    Address,
    Answer,
    Request,
    TooLateError,
    UnreachableError,
    api_key,
    json_headers,
    json_object,
    shown,
)
from scorer.engines.spans import check_token_ids, no_scores, with_sums
from scorer.models.find import ModelFiles, model_settings, weight_bytes
from scorer.tokens import Array, SpanScores, TokenBatch
from scorer.types import EngineError, ScorerError

API_KEY = "VLLM_API_KEY"  # environment variable, of the client as of the server
WAIT = "SCORER_SERVER_WAIT"  # environment variable: Limits.wait
REQUEST_SEQUENCES = 128
CONCURRENT_REQUESTS = 8
RETRIED = (500, 502, 503, 504)  # statuses of a server that starts or dies, and of a proxy before one
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds between two tries; each pause is twice the one before
DESCRIPTION_BYTES = 1 << 16
SPAN_BYTES = 64  # [NLL, tokens] as JSON takes 40 at most
# The least sum a token: float32's rounding can put the NLL of a certain token below 0, by 1e-4 where logits are large.
LEAST_NLL = -1e-3
# What is read of a server's description of its model; the rest goes to the manifest.
DESCRIPTION: Mapping[str, tuple[type, ...]] = {
    "identity": (str,),
    "model": (str,),
    "revision": (str, NoneType),
    "dtype": (str,),
    "shape": (dict,),
    "vocab_size": (int,),
    "max_model_len": (int,),
}


def _wait_seconds() -> float:
    """The environment's value of `Limits.wait`. Raises ScorerError for a wrong one."""
    text = os.environ.get(WAIT, "180")  # a server takes a minute or two to start
    if not text.isdecimal():
        raise ScorerError(f"{WAIT}: '{text}' is not a whole number of seconds")
    return float(text)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that a client gives a server.

    wait: for a server that can't be reached to be there, or there again. answer: for the scores of one request.
    quiet: without an answer, after which the user is told.
    """

    wait: float = field(default_factory=_wait_seconds)
    answer: float = 600.0
    quiet: float = 30.0


class Server:
    """A client of a server that scores with one model.

    Nothing that the server says is believed before it is checked. Raises ScorerError where the server can't be reached,
    does not score, or serves another model than that of `files`.
    """

    def __init__(self, url: str, files: ModelFiles | None = None, limits: Limits | None = None):
        self.url = url.rstrip("/")
        self.limits = limits or Limits()
        self.address = Address(self.url)
        self.headers = json_headers(api_key(API_KEY))
        self.heard = time.monotonic()  # the last answer
        self.told = False  # that it is waited for; two threads may both tell, which does no harm
        # A server that still loads its model may take a connection and stay silent.
        patience = max(self.limits.wait, 2 * self.limits.quiet)
        try:
            answer = self._ask(Request("GET", "/v1/scorer/model", None, patience, DESCRIPTION_BYTES))
        except EngineError as error:
            raise ScorerError(str(error)) from error
        wrong = [
            name
            for name, kinds in DESCRIPTION.items()
            if type(answer.get(name, ...)) not in kinds or not str(answer[name]).isprintable()  # messages have these
        ]
        if not wrong and answer["dtype"] not in DTYPES:
            wrong = ["dtype"]
        if wrong:  # a page of another server, such as a proxy
            raise ScorerError(str(self._wrong(f"its description of the model has no {wrong[0]}, or a wrong one")))
        self.model: dict[str, Any] = answer
        if files is not None:
            check_model(self.model, files, self.url)

    def score(self, batch: TokenBatch, sequences: Array) -> SpanScores:
        """The scores of some sequences. Raises EngineError where the server stays unreachable or its model changed."""
        spans, counts = batch.spans(sequences)
        asked = [{"token_ids": batch.ids(i), "spans": batch.bounds(i)} for i in sequences.tolist()]
        body = orjson.dumps({"sequences": asked}, option=orjson.OPT_SERIALIZE_NUMPY)
        most = DESCRIPTION_BYTES + SPAN_BYTES * len(spans)
        answer = self._ask(Request("POST", "/v1/scorer/score", body, self.limits.answer, most))
        if answer.get("identity") != self.model["identity"]:
            raise EngineError(f"{self.url} serves another model than when the run started: serve that model again")
        if answer.get("request") != hashlib.sha256(body).hexdigest():
            raise self._wrong("it is the answer to another request, or of another version of scorer")
        tokens = (batch.ends - batch.starts)[spans]
        try:
            return with_sums(batch, spans, parse_rows(answer.get("rows"), counts, tokens))
        except ValueError as error:
            raise self._wrong(str(error)) from error

    def _ask(self, request: Request) -> dict[str, Any]:
        """The JSON object that the server answers with, if need be after some tries."""
        answer = self._try_until_reached(request)
        if answer.status == 401:
            raise ScorerError(f"{self.url} needs an API key: set the environment variable {API_KEY}")
        if answer.status == 404:
            raise ScorerError(f"{self.url} does not score: start it with `scorer serve`")
        if 300 <= answer.status < 400:
            raise EngineError(f"{self.url} redirects to {shown(answer.location)}, which is not followed")
        if answer.status != 200:
            raise EngineError(f"{self.url} answers {answer.status}: {shown(answer.body)}")
        try:
            return json_object(answer.body, request.most_bytes)
        except ValueError as error:  # a page of another server, such as a proxy
            raise self._wrong(str(error)) from error

    def _try_until_reached(self, request: Request) -> Answer:
        """The server's answer; one that it may get over is asked for again, until `limits.wait` seconds have passed."""
        latest, pause = None, FIRST_PAUSE
        while True:
            try:
                answer = self.address.ask(request, self.headers, (self.limits.quiet, self._tell_of_silence))
                self.heard = time.monotonic()
                if answer.status not in RETRIED:
                    self.told = False
                    return answer
                why = f"answers {answer.status}: {shown(answer.body)}"
            except UnreachableError as error:
                why = f"does not answer ({error})"
            except TooLateError as error:  # a second try would only be one more request for a server that is too slow
                raise EngineError(f"{self.url} gave no whole answer within {request.seconds:g} s") from error
            now = time.monotonic()
            latest = latest or now + self.limits.wait
            if now + pause > latest:
                raise EngineError(f"{self.url} {why}")
            self._tell(f"{self.url} {why}; waiting for it for up to {self.limits.wait:g} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _tell_of_silence(self) -> None:
        if time.monotonic() - self.heard >= self.limits.quiet:
            self._tell(f"{self.url} has been silent for {self.limits.quiet:g} s; waiting for it")

    def _tell(self, message: str) -> None:
        if not self.told:
            self.told = True
            logging.getLogger(__name__).warning(message)

    def _wrong(self, what: str) -> EngineError:
        return EngineError(f"{self.url} answers, but not as `scorer serve` of this version does: {what}")


def parse_rows(rows: Any, counts: Array, tokens: Array) -> Array:
    """The NLL sums, float64 [S], of `rows`: for each sequence the [NLL sum or null, tokens] of its spans.

    counts: int64 [Q], the spans of each sequence asked for. tokens: int64 [S], the tokens of each span. A sum that is
    null is infinite or undefined, and becomes NaN. Raises ValueError for anything else than such rows.
    """
    if type(rows) is not list or [len(row) if type(row) is list else -1 for row in rows] != counts.tolist():
        raise ValueError("its rows are not those of the sequences and spans that were asked for")
    pairs = [pair for row in rows for pair in row]
    if not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        raise ValueError("a span has something else than an NLL and a number of tokens")
    sums, found = [nll for nll, _ in pairs], [count for _, count in pairs]
    if not ({*map(type, sums)} <= {float, int, NoneType} and {*map(type, found)} <= {int}):
        raise ValueError("an NLL is not a number, or a number of tokens is not whole")
    if found != tokens.tolist():
        raise ValueError("it scored other numbers of tokens than those of the spans that were asked for")
    nll_sums = np.array([np.nan if nll is None else nll for nll in sums], np.float64)
    if (nll_sums < LEAST_NLL * tokens).any():
        raise ValueError("an NLL is negative")
    return nll_sums


class RemoteEngine:
    """The contract of `scorer.engines.Engine`, by a server. Raises ScorerError as `Server` does."""

    def __init__(self, config: ScoreConfig, files: ModelFiles, limits: Limits | None = None):
        self.server = Server(config.engine, files, limits)
        assert config.max_length is not None
        if config.max_length > (served := self.server.model["max_model_len"]):
            raise ScorerError(
                f"{config.engine} takes {served} tokens a sequence, less than max_length {config.max_length}"
            )

    def score(self, batches: Iterable[TokenBatch | None]) -> Iterator[SpanScores]:
        """Yield the scores of each request, in order."""
        pending: deque[Background[SpanScores]] = deque()
        try:
            for batch in batches:
                if batch is None:
                    yield pending.popleft().result()
                    continue
                check_token_ids(batch, self.server.model["vocab_size"])
                if not len(batch):
                    yield no_scores(batch)
                for start in range(0, len(batch), REQUEST_SEQUENCES):
                    if len(pending) == CONCURRENT_REQUESTS:
                        yield pending.popleft().result()
                    some = np.arange(start, min(start + REQUEST_SEQUENCES, len(batch)))
                    pending.append(Background(self.server.score, batch, some))
            while pending:
                yield pending.popleft().result()
        finally:
            for request in pending:
                request.cancel(0)

    def close(self) -> None:
        """Nothing to free: each request has a connection of its own."""


def check_model(served: dict[str, Any], files: ModelFiles, url: str) -> None:
    """Raise ScorerError where the served model differs from that of `files` in its revision or its network's shape."""
    settings = model_settings(files)
    differs = [name for name, value in served["shape"].items() if settings.get(name, value) != value]
    known = files.origin != "directory" or weight_bytes(files)  # a directory's revision needs its weights
    if known and served["revision"] not in (None, files.revision):
        differs.append("revision")
    if differs:
        raise ScorerError(f"{url} serves {served['model']}, not {files.name}: they differ in {shown(differs[0])}")
