"""The engine of a remote server: sends token sequences over HTTP to a vLLM server with the routes of vllm_server.py.

Knows the routes and when to retry; neither vLLM nor models.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import orjson
import urllib3

from scorer.background import Background
from scorer.config import ScoreConfig
from scorer.engines.spans import check_token_ids, no_scores, with_counted_sums
from scorer.models.find import ModelFiles, model_settings, weight_bytes
from scorer.tokens import Array, SpanScores, TokenBatch
from scorer.types import EngineError, ScorerError

API_KEY = "VLLM_API_KEY"  # environment variable, of the client as of the server
REQUEST_SEQUENCES = 128
CONCURRENT_REQUESTS = 8
# A server takes a minute or two to restart: waits of 1, 2, 4, ... 15 seconds, twelve times.
RETRIES = urllib3.Retry(
    total=12,
    redirect=0,
    backoff_factor=0.5,
    backoff_max=15,
    status_forcelist=(500, 502, 503, 504),
    allowed_methods=None,
    raise_on_status=False,
)
RETRY_ONCE = urllib3.Retry(total=1, redirect=0)  # before a run has started, a wait would save no work
TIMEOUT = urllib3.Timeout(connect=5, read=600)


class Server:
    """A client of a server that scores with one model.

    Raises ScorerError where the server can't be reached, does not score, or serves another model than that of `files`.
    """

    def __init__(self, url: str, files: ModelFiles | None = None):
        self.url = url.rstrip("/")
        key = os.environ.get(API_KEY)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.pool = urllib3.PoolManager(maxsize=CONCURRENT_REQUESTS, headers=headers, timeout=TIMEOUT)
        try:
            self.model: dict[str, Any] = self._request(
                "GET", "/v1/scorer/model", None, RETRY_ONCE, {"identity", "shape"}
            )
        except EngineError as error:
            raise ScorerError(str(error)) from error
        if files is not None:
            check_model(self.model, files, self.url)

    def score(self, batch: TokenBatch, sequences: Array) -> SpanScores:
        """The scores of some sequences. Raises EngineError where the server stays unreachable or its model changed."""
        body = {
            "sequences": [{"token_ids": batch.ids(i), "spans": batch.bounds(i)} for i in sequences.tolist()],
        }
        answer = self._request("POST", "/v1/scorer/score", body, RETRIES, {"identity", "rows"})
        if answer["identity"] != self.model["identity"]:
            raise EngineError(f"{self.url} serves another model than when the run started: serve that model again")
        # A sum that is null is infinite or undefined.
        return with_counted_sums(batch, sequences, [np.array(row, np.float64) for row in answer["rows"]])

    def _request(self, method: str, path: str, body: Any, retries: urllib3.Retry, keys: set[str]) -> Any:
        """The JSON object that the server answers with, which has `keys`."""
        data = None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        try:
            response = self.pool.request(method, self.url + path, body=data, retries=retries)
        except urllib3.exceptions.LocationValueError as error:
            raise ScorerError(f"{self.url} is not a URL: give http://HOST:PORT") from error
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise EngineError(f"{self.url} does not answer ({type(reason).__name__})") from error
        if response.status == 401:
            raise ScorerError(f"{self.url} needs an API key: set the environment variable {API_KEY}")
        if response.status == 404:
            raise ScorerError(f"{self.url} does not score: start it with `scorer serve`")
        try:
            answer = response.json()
        except ValueError:
            answer = response.data[:200].decode(errors="replace")
        if response.status != 200:
            raise EngineError(f"{self.url} answers {response.status}: {answer}")
        if not isinstance(answer, dict) or not keys <= answer.keys():  # a page of another server, such as a proxy
            raise EngineError(f"{self.url} answers, but does not score: start `scorer serve` there")
        return answer

    def close(self) -> None:
        """Close the connections."""
        self.pool.clear()


class RemoteEngine:
    """The contract of `scorer.engines.Engine`, by a server. Raises ScorerError as `Server` does."""

    def __init__(self, config: ScoreConfig, files: ModelFiles):
        self.server = Server(config.engine, files)
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
        """Close the connections."""
        self.server.close()


def check_model(served: dict[str, Any], files: ModelFiles, url: str) -> None:
    """Raise ScorerError where the served model differs from that of `files` in its revision or its network's shape."""
    settings = model_settings(files)
    differs = [name for name, value in served["shape"].items() if settings.get(name, value) != value]
    known = files.origin != "directory" or weight_bytes(files)  # a directory's revision needs its weights
    if known and served["revision"] not in (None, files.revision):
        differs.append("revision")
    if differs:
        raise ScorerError(f"{url} serves {served['model']}, not {files.name}: they differ in {differs[0]}")
