"""The engine that is served elsewhere: token sequences over HTTP to a vLLM server that has vllm_endpoint.py.

Knows the server's two routes and how to wait for it; neither vLLM nor models.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import urllib3

from scorer.background import Background
from scorer.config import ScoreConfig
from scorer.engines.spans import check_token_ids, with_counted_sums
from scorer.models.find import ModelFiles, model_settings, weight_bytes
from scorer.types import EngineError, ScorerError, SpanNLL, TokenSequence

KEY = "VLLM_API_KEY"  # of the environment, as for the server
SEQUENCES = 128  # in one request
REQUESTS = 8  # at once
# A server that has to start again takes a minute or two: waits of 1, 2, 4 ... 15 seconds, twelve times.
RETRIES = urllib3.Retry(
    total=12,
    redirect=0,
    backoff_factor=0.5,
    backoff_max=15,
    status_forcelist=(500, 502, 503, 504),
    allowed_methods=None,
    raise_on_status=False,
)
AT_ONCE = urllib3.Retry(total=1, redirect=0)  # before a run has begun there is nothing to save by waiting
TIMEOUT = urllib3.Timeout(connect=5, read=600)


class Server:
    """A connection to the server of one model: that of `files`, or whichever it is.

    Raises ScorerError where the server can't be reached, does not score, or serves another model.
    """

    def __init__(self, url: str, files: ModelFiles | None = None):
        self.url = url.rstrip("/")
        key = os.environ.get(KEY)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.pool = urllib3.PoolManager(maxsize=REQUESTS, headers=headers, timeout=TIMEOUT)
        try:
            self.model: dict[str, Any] = self._ask("GET", "/v1/scorer/model", None, AT_ONCE, {"identity", "shape"})
        except EngineError as error:
            raise ScorerError(str(error)) from error
        if files is not None:
            check_model(self.model, files, self.url)

    def score(self, sequences: Sequence[TokenSequence]) -> list[SpanNLL]:
        """The spans of `sequences`. Raises EngineError where the server stays away, or serves another model now."""
        body = {
            "sequences": [
                {"token_ids": s.token_ids, "spans": [[span.start, span.end] for span in s.targets]} for s in sequences
            ]
        }
        answer = self._ask("POST", "/v1/scorer/score", body, RETRIES, {"identity", "rows"})
        if answer["identity"] != self.model["identity"]:
            raise EngineError(f"{self.url} serves another model than when the run began: serve that one again")
        rows = [[[float("nan") if nll is None else nll, n] for nll, n in row] for row in answer["rows"]]
        return with_counted_sums(zip(sequences, rows, strict=True))

    def _ask(self, method: str, path: str, body: Any, retries: urllib3.Retry, keys: set[str]) -> Any:
        """The answer, an object that has `keys`."""
        data = None if body is None else json.dumps(body).encode()
        try:
            response = self.pool.request(method, self.url + path, body=data, retries=retries)
        except urllib3.exceptions.LocationValueError as error:
            raise ScorerError(f"{self.url}: not an address, which is http://HOST:PORT") from error
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise EngineError(f"{self.url} does not answer ({type(reason).__name__})") from error
        if response.status == 401:
            raise ScorerError(f"{self.url} wants an API key: put it into {KEY}")
        if response.status == 404:
            raise ScorerError(f"{self.url} does not score: start it with `scorer serve`")
        try:
            answer = response.json()
        except ValueError:
            answer = response.data[:200].decode(errors="replace")
        if response.status != 200:
            raise EngineError(f"{self.url} answers {response.status}: {answer}")
        if not isinstance(answer, dict) or not keys <= answer.keys():  # another's page, such as a proxy's
            raise EngineError(f"{self.url} answers, but does not score: start `scorer serve` there")
        return answer

    def close(self) -> None:
        """Drop the connections."""
        self.pool.clear()


class RemoteEngine:
    """The contract of `scorer.engines.Engine`, by a server. Raises ScorerError where it serves another model."""

    def __init__(self, config: ScoreConfig, files: ModelFiles):
        self.server = Server(config.engine, files)
        assert config.max_length is not None
        if config.max_length > (served := self.server.model["max_model_len"]):
            raise ScorerError(f"{config.engine} takes {served} tokens, and max_length is {config.max_length}")

    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[list[SpanNLL]]:
        """The spans of each request, in order."""
        check_token_ids(sequences, self.server.model["vocab_size"])
        starts = iter(range(0, len(sequences), SEQUENCES))
        pending: deque[Background[list[SpanNLL]]] = deque()
        try:
            while True:
                for start in islice(starts, REQUESTS - len(pending)):
                    pending.append(Background(self.server.score, sequences[start : start + SEQUENCES]))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            for request in pending:
                request.cancel(0)

    def close(self) -> None:
        """Drop the connections."""
        self.server.close()


def check_model(served: dict[str, Any], files: ModelFiles, url: str) -> None:
    """Raise ScorerError where the served model is not that of `files`, by its revision and the shape of its network."""
    settings = model_settings(files)
    differs = [name for name, value in served["shape"].items() if settings.get(name, value) != value]
    known = files.origin != "directory" or weight_bytes(files)  # of a folder, the revision is that of its weights too
    if known and served["revision"] not in (None, files.revision):
        differs.append("revision")
    if differs:
        raise ScorerError(f"{url} serves {served['model']}, which is not {files.name}: they differ in {differs[0]}")
