"""The remote engine against servers that answer wrongly, late, without end or not at all: one error each, no score."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from scorer.config import ScoreConfig
from scorer.engines.vllm_client import LEAST_NLL, Limits, RemoteEngine
from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from scorer.types import EngineError, ScorerError
from tests.engines.test_engines import samples
from tests.lib.command import Commands, alpaca, shards
from tests.lib.tokens import token_batch
from tests.lib.web import Sent, WebServer, drip, http, silent

Tiny = Callable[[str], ModelFiles]
Json = dict[str, Any]
Change = Callable[[Json], object]
DESCRIPTION: Json = {
    "identity": "one",
    "model": "a model",
    "revision": None,
    "dtype": "float32",
    "shape": {"vocab_size": 257},
    "vocab_size": 257,
    "max_model_len": 1024,
}
LIMITS = Limits(wait=0.2, answer=1.0, quiet=0.4)


def right(body: bytes) -> Json:
    """The scores of a request: half a nat a token."""
    rows = [[[(end - start) / 2, end - start] for start, end in s["spans"]] for s in json.loads(body)["sequences"]]
    return {"identity": "one", "request": hashlib.sha256(body).hexdigest(), "rows": rows}


@pytest.fixture
def server() -> Iterator[WebServer]:
    web = WebServer(lambda body: http(json.dumps(right(body)).encode()), http(json.dumps(DESCRIPTION).encode()))
    yield web
    web.close()


def changed(change: Change) -> Callable[[bytes], bytes]:
    """The right answer, changed."""

    def answer(body: bytes) -> bytes:
        scores = right(body)
        change(scores)
        return http(json.dumps(scores).encode())

    return answer


def first_span(nll: Any, tokens: Any) -> Callable[[bytes], bytes]:
    """The right answer, but for the NLL and the number of tokens (None: the right one) of the first span."""

    def change(scores: Json) -> None:
        own = scores["rows"][0][0]
        own[:] = [nll, own[1] if tokens is None else tokens]

    return changed(change)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
WRONG: dict[str, tuple[Callable[[bytes], Sent], str]] = {
    "a negative sum": (first_span(-30, None), "an NLL is negative"),
    "a sum just below what rounding gives": (first_span(1.1 * LEAST_NLL * 5, None), "an NLL is negative"),
    "NaN": (first_span(float("nan"), None), "not JSON"),
    "infinity": (first_span(float("inf"), None), "not JSON"),
    "beyond float64": (lambda body: http(json.dumps(right(body)).replace("2.5", "1e999").encode()), "not JSON"),
    "a sum that is a string": (first_span("2.5", None), "not a number"),
    "a sum that is a boolean": (first_span(True, None), "not a number"),
    "a sum that is a list": (first_span([2.5], None), "not a number"),
    "a count with a fraction": (first_span(2.5, 5.9), "not whole"),
    "a count that is a float": (first_span(2.5, 5.0), "not whole"),
    "a count that is a boolean": (first_span(2.5, True), "not whole"),
    "a null count": (changed(lambda s: s["rows"][0][0].__setitem__(1, None)), "not whole"),
    "another count": (first_span(2.5, 4), "other numbers of tokens"),
    "a count beyond 64 bits": (first_span(2.5, 1 << 80), "not whole"),
    "a count of 64 bits": (first_span(2.5, (1 << 64) - 1), "other numbers of tokens"),
    "a span too many": (changed(lambda s: s["rows"][0].append([1.0, 1])), "its rows are not those"),
    "a span too few": (changed(lambda s: s["rows"][0].pop()), "its rows are not those"),
    "a row too many": (changed(lambda s: s["rows"].append([[1.0, 1]])), "its rows are not those"),
    "a row too few": (changed(lambda s: s["rows"].pop()), "its rows are not those"),
    "rows in another order": (changed(lambda s: s["rows"].reverse()), "other numbers of tokens"),
    "a span of three": (changed(lambda s: s["rows"][0][0].append(1)), "something else than an NLL"),
    "a span that is an object": (changed(lambda s: s["rows"][0].__setitem__(0, {"nll": 1})), "something else"),
    "rows that are an object": (changed(lambda s: s.update(rows={"0": []})), "its rows are not those"),
    "no rows": (changed(lambda s: s.pop("rows")), "its rows are not those"),
    "a row that is null": (changed(lambda s: s["rows"].__setitem__(0, None)), "its rows are not those"),
    "an answer to another request": (changed(lambda s: s.update(request="0" * 64)), "another request"),
    "an answer to no request": (changed(lambda s: s.pop("request")), "another request"),
    "another model": (changed(lambda s: s.update(identity="two")), "serves another model"),
    "a list": (lambda _: http(b"[1, 2]"), "not a JSON object"),
    "deep JSON": (lambda _: http(b"[" * 60_000), "nested too deep"),
    "not UTF-8": (lambda _: http(b'{"identity": "\xff\xfe"}'), "not JSON"),
    "a web page": (lambda _: http(b"<html>Log in", "200 OK", "Content-Type: text/html"), "not JSON (<html>Log in)"),
    "nothing": (lambda _: http(b""), "not JSON"),
    "compressed": (lambda body: http(gzip.compress(body), "200 OK", "Content-Encoding: gzip"), "not JSON"),
    "too long": (lambda _: http(b" " * 100_000), "more than 65,"),
    "a length beyond any memory": (lambda _: http(b"{}").replace(b"h: 2", b"h: 999999999999"), "ended before"),
    "without end": (lambda _: drip(b" " * 100_000, b"HTTP/1.1 200 OK\r\n\r\n"), "more than 65,"),
    "a slow body": (lambda _: drip(b" ", b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n"), "no whole answer within"),
    "a slow body of any length": (lambda _: drip(b" ", b"HTTP/1.1 200 OK\r\n\r\n"), "no whole answer within"),
    "a slow header": (lambda _: drip(b"a", b"HTTP/1.1 200 OK\r\nX-A: "), "no whole answer within"),
    "headers without end": (lambda _: drip(b"X-A: b\r\n" * 60, b"HTTP/1.1 200 OK\r\n"), "not HTTP"),
    "slow chunks": (lambda _: drip(b"1\r\n \r\n", CHUNKED), "no whole answer within"),
    "silence": (lambda _: silent(), "no whole answer within"),
    "a chunk without a size": (lambda _: CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", "ended before the answer"),
    "a chunk cut off": (lambda _: CHUNKED + b"ff\r\n{}", "ended before the answer"),
    "a body cut off": (lambda body: http(json.dumps(right(body)).encode())[:-9], "ended before the answer"),
    "a connection closed at once": (lambda _: b"", "does not answer"),
    "not HTTP": (lambda _: b"SSH-2.0-OpenSSH_9.6\r\n", "not HTTP"),
    "a redirect": (lambda _: http(b"", "302 Found", "Location: http://elsewhere.test/x"), "redirects to http://elsewhere"),
    "an error of many lines": (lambda _: http(b"<p>\n\x1b[31m" + b"x" * 10_000_000, "500 Error"), r": <p> \x1b[31mx"),
    "a refusal": (lambda _: http(b'{"detail": "no"}', "422 Unprocessable"), 'answers 422: {"detail": "no"}'),
    "too many requests": (lambda _: http(b"slow down", "429 Too Many Requests"), "answers 429: slow down"),
}  # fmt: skip


def engine_of(server: WebServer, files: ModelFiles, limits: Limits = LIMITS) -> RemoteEngine:
    return RemoteEngine(ScoreConfig(engine=server.url, max_length=1024, device="auto"), files, limits)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_one_error_that_names_the_server(tiny: Tiny, server: WebServer, case: str) -> None:
    engine = engine_of(server, tiny("gpt2"))
    server.answer, words = WRONG[case]
    began = time.monotonic()
    with pytest.raises(EngineError) as raised:
        list(engine.score([token_batch(samples([(3, 5), (2, 9)]))]))
    message = str(raised.value)
    assert words in message
    assert server.url in message
    assert message.isprintable()
    assert len(message) < 500
    assert time.monotonic() - began < 4
    assert server.requests == 1


def test_a_right_answer_is_taken_as_it_is(tiny: Tiny, server: WebServer) -> None:
    """A sum that rounding put below zero is not clipped; one that is null is of no finite number."""
    server.answer = changed(lambda s: (s["rows"][0][0].__setitem__(0, -1e-5), s["rows"][1][0].__setitem__(0, None)))
    (scores,) = engine_of(server, tiny("gpt2")).score([token_batch(samples([(3, 5), (2, 9)]))])
    assert np.nan_to_num(scores.nll_sums, nan=-1).tolist() == [-1e-5, -1, 4.5, 4]
    assert scores.statuses.tolist()[0] == scores.statuses.tolist()[2] != scores.statuses.tolist()[1]


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (http(json.dumps(DESCRIPTION | {"vocab_size": "257"}).encode()), "no vocab_size, or a wrong one"),
        (http(json.dumps(DESCRIPTION | {"max_model_len": True}).encode()), "no max_model_len, or a wrong one"),
        (http(json.dumps(DESCRIPTION | {"shape": None}).encode()), "no shape, or a wrong one"),
        (http(json.dumps(DESCRIPTION | {"model": "\x1b[2J"}).encode()), "no model, or a wrong one"),
        (http(json.dumps(DESCRIPTION | {"shape": {"vocab_size": 9}}).encode()), "they differ in vocab_size"),
        (http(json.dumps(DESCRIPTION | {"dtype": "float99"}).encode()), "no dtype, or a wrong one"),
        (http(b'{"more": ' + b"[" * 999 + b"]" * 999 + b"}"), "nested too deep"),
        (http(b'{"x": "' + b"y" * 100_000), "more than 65,536 bytes"),
        (http(b"", "301 Moved", "Location: https://elsewhere.test"), "redirects to https://elsewhere.test"),
        (http(b"", "401 Unauthorized"), "API key"),
        (http(b"loading", "503 Service Unavailable"), "answers 503: loading"),
    ],
)  # fmt: skip
def test_a_wrong_description(tiny: Tiny, server: WebServer, description: bytes, words: str) -> None:
    server.page = description
    with pytest.raises(ScorerError, match=words) as raised:
        engine_of(server, tiny("gpt2"))
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "url", ["http://", "http://a:b", "http://me:secret@host", "http://host/?key=secret", "http://a b"]
)
def test_what_is_no_address(tiny: Tiny, url: str) -> None:
    with pytest.raises(ScorerError, match="not http://HOST:PORT") as raised:
        RemoteEngine(ScoreConfig(engine=url, max_length=1024), tiny("gpt2"), LIMITS)
    assert "secret" not in str(raised.value)


def test_silence_is_told_once(tiny: Tiny, server: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(server, tiny("gpt2"))
    server.answer = lambda _: silent()
    with pytest.raises(EngineError):
        list(engine.score([token_batch(samples([(3, 5)] * 300))]))
    assert caplog.messages == [f"{server.url} has been silent for 0.4 s; waiting for it"]


def test_a_client_that_comes_early_waits(tiny: Tiny, server: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    good, server.page = server.page, http(b"loading", "503 Service Unavailable")

    def load() -> None:
        time.sleep(1)
        server.page = good

    Thread(target=load).start()
    assert engine_of(server, tiny("gpt2"), Limits(wait=9)).server.model == DESCRIPTION
    assert caplog.messages == [f"{server.url} answers 503: loading; waiting for it for up to 9 s"]


def test_a_run_keeps_what_was_scored_before_a_wrong_answer(tiny: Tiny, server: WebServer, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(alpaca(30)))
    command = Commands(tmp_path)
    given = ("score", "data.json", "-o", "run", "--model", tiny("gpt2").path, "--engine", server.url, "--shard-rows", 5)
    good, wrong = server.answer, first_span(-30, None)
    server.answer = lambda body: wrong(body) if server.requests > 3 else good(body)
    ended = command(*given, SCORER_SERVER_WAIT="0")
    assert ended.code == 1
    assert (
        f"scorer: {server.url} answers, but not as `scorer serve` of this version does: an NLL is negative" in ended.err
    )
    assert "Traceback" not in ended.err
    before = shards(tmp_path / "run")
    server.answer = good
    assert f"resuming after {5 * before}" in command(*given).done() or before == 0
    scores = Run(tmp_path / "run").scores()
    assert set(scores["status"]) == {"ok"}
    assert scores["nll_conditioned"].to_list() == (scores["response_tokens"] / 2).to_list()


def test_a_wrong_limit_or_key(server: WebServer, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(alpaca(1)))
    given = ("score", "data.json", "-o", "run", "--engine", server.url)
    assert "SCORER_SERVER_WAIT: 'long'" in Commands(tmp_path)(*given, SCORER_SERVER_WAIT="long").line()
    line = Commands(tmp_path)(*given, VLLM_API_KEY="a\nsecret").line()
    assert "VLLM_API_KEY: an HTTP header can't hold" in line
    assert "secret" not in line
