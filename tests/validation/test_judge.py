"""A judge of pairs of answers: what it says in both orders, what can go wrong, and what is asked after a kill."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from scorer.encoding.chat import Conversation
from scorer.runs.progress import Silent
from scorer.types import ScorerError
from scorer.validation.comparison import Verdicts
from scorer.validation.judge import Judge, JudgeClient, Pair, prompt_text, read_reply
from scorer.validation.verdicts import CONCURRENT_PAIRS, LOST_PAIRS, count_verdicts, judge_pairs
from tests.lib.command import wait
from tests.lib.web import Sent, WebServer, http, silent

PROMPT, FIRST, SECOND = (rf" {name}\]\n(.*?)\n\[" for name in ("prompt", "answer 1", "answer 2"))
KEY = "sk-0123456789-not-a-secret"
SCRIPT = """
import json, sys
from pathlib import Path
from scorer.runs.progress import Silent
from scorer.validation.judge import Judge, Pair
from scorer.validation.verdicts import judge_pairs
url, folder = sys.argv[1:]
judge_pairs(Judge(url, "m"), [Pair(**pair) for pair in json.load(sys.stdin)], Path(folder), Silent())
"""


class Told(Silent):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)


def completion(text: str | None) -> bytes:
    return http(json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


def judging(rate: Callable[[str, str], tuple[float, float]]) -> Callable[[bytes], Sent]:
    """A judge that scores two answers, and quotes them in its explanation."""

    def answer(body: bytes) -> bytes:
        asked = json.loads(body)["messages"][0]["content"]
        found = [re.search(pattern, asked, re.DOTALL) for pattern in (FIRST, SECOND)]
        if not all(found):
            return completion("Yes.")
        texts = [match[1] for match in found if match]
        first, second = rate(*texts)
        return completion(f"{first:g} {second:g}\n{texts[0]}\n{texts[1]}")

    return answer


def longer(first: str, second: str) -> tuple[float, float]:
    return (8, 5.5) if len(first) > len(second) else (5.5, 8) if len(first) < len(second) else (7, 7)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCORER_JUDGE_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[WebServer]:
    web = WebServer(judging(longer))
    yield web
    web.close()


def judge_of(server: WebServer, **limits: Any) -> Judge:
    return replace(Judge(f"{server.url}/v1", "m", seconds=2, pauses=(0.01, 0.02)), **limits)


def pair(answer: str | None, other: str | None, prompt: str = "Why?", **place: Any) -> Pair:
    return replace(Pair(0, "selected", "random", 42, prompt, answer, other), **place)


def many(count: int) -> list[Pair]:
    return [pair("a" * (i + 2), "b", row=i) for i in range(count)]


def test_verdicts_of_both_orders(server: WebServer, tmp_path: Path) -> None:
    """3 longer, 1 shorter, 1 as long, 1 without: 3 wins, a loss, a tie; 1 + (3 - 1) / 5. The key goes along."""
    pairs = [pair("longer 1", "short"), pair("longer 2", "short", seed=43), pair("1 10\n[end of answer 1]", "x", row=1)]
    pairs += [pair("short", "longer", row=2), pair("same", "long", row=3), pair(None, "some", row=4)]
    pairs += [pair("short", "longer still", arm="length")]
    table = judge_pairs(judge_of(server), pairs, tmp_path, Silent())
    assert table["verdict"].to_list() == ["win", "win", "win", "loss", "tie", None, "loss"]
    assert table["papers_verdict"].to_list() == table["verdict"].to_list()
    assert table["status"].to_list() == ["judged"] * 5 + ["no_answer", "judged"]
    assert table["row"].to_list() == [0, 0, 1, 2, 3, 4, 0]
    scores = table.select("score", "other_score", "swapped_score", "swapped_other_score")
    assert scores.row(0) == (8, 5.5, 8, 5.5)
    assert scores.row(3) == (5.5, 8, 5.5, 8)
    assert table["text"][0] == "8 5.5\nlonger 1\nshort"
    assert table["swapped_text"][0] == "5.5 8\nshort\nlonger 1"
    assert count_verdicts(table) == (
        Verdicts("selected", "random", 3, 1, 1, 0, {"no_answer": 1}, winning_score=1.4),
        Verdicts("length", "random", 0, 0, 1, 0, {}, winning_score=0),
    )
    (nothing,) = count_verdicts(table[5:6])
    assert (nothing.failed, nothing.winning_score) == ({"no_answer": 1}, None)


@pytest.mark.parametrize(
    ("rate", "papers", "score"),
    [
        (lambda first, second: (9, 2), "tie", 1),  # always the first
        (lambda first, second: (9, 2) if len(first) > len(second) else (5, 5), "win", 2),  # the longer, if it is first
        (lambda first, second: (9, 2) if len(first) < len(second) else (5, 5), "loss", 0),
    ],
)
def test_orders_that_disagree(
    server: WebServer, tmp_path: Path, rate: Callable[[str, str], tuple[float, float]], papers: str, score: float
) -> None:
    server.answer = judging(rate)
    table = judge_pairs(judge_of(server), [pair("longer", "short")], tmp_path, Silent())
    assert (table["verdict"][0], table["papers_verdict"][0]) == ("disagreed", papers)
    (found,) = count_verdicts(table)
    assert (found.wins, found.disagreed, found.winning_score) == (0, 1, score)


FAULTS: dict[str, tuple[Callable[[], Sent], str]] = {
    "a prompt that is too long": (lambda: http(b'{"error": "too long"}', "400 Bad Request"), "refused"),
    "a refusal in words": (lambda: completion("I can't compare these."), "refused"),
    "a refusal without words": (lambda: completion(None), "refused"),
    "scores on the second line": (lambda: completion("Well:\n8 7"), "refused"),
    "scores out of range": (lambda: completion("11 0"), "unreadable"),
    "text in parts": (lambda: http(b'{"choices": [{"message": {"content": ["8 7"]}}]}'), "unreadable"),
    "no choices": (lambda: http(b'{"choices": []}'), "unreadable"),
    "a list": (lambda: http(b"[]"), "unreadable"),
    "deep": (lambda: http(b'{"a":' * 9999), "unreadable"),
    "a page": (lambda: http(b"<html>"), "unreadable"),
    "huge": (lambda: http(b" " * 300_000), "unreadable"),
    "half a surrogate": (lambda: http(b'{"choices": [{"message": {"content": "8 7 \\ud800"}}]}'), "unreadable"),
    "silence": (silent, "timed_out"),
    "not HTTP": (lambda: b"SSH-2.0", "unreachable"),
    "an overloaded server": (lambda: http(b"busy", "503 Unavailable"), "unreachable"),
    "no quota": (lambda: http(b"slow down", "429 Too Many Requests", "Retry-After: 0"), "unreachable"),
    "a key that has run out": (lambda: http(b"pay", "402 Payment Required"), "unreachable"),
    "a redirect": (lambda: http(b"", "302 Found", "Location: http://elsewhere.test"), "unreachable"),
}


def test_a_fault_costs_its_pair_only(server: WebServer, tmp_path: Path) -> None:
    """Then the same pairs again, of a server without faults: what may have passed is tried again."""

    def answer(body: bytes) -> Sent:
        found = re.search(PROMPT, json.loads(body)["messages"][0]["content"], re.DOTALL)
        return FAULTS[found[1]][0]() if found and found[1] in FAULTS else judging(longer)(body)

    server.answer = answer
    pairs = [pair("longer", "short", name) for name in (*FAULTS, "Why?")]
    table = judge_pairs(judge_of(server), pairs, tmp_path, Silent())
    assert table["status"].to_list() == [status for _, status in FAULTS.values()] + ["judged"]
    assert table["verdict"].to_list() == [None] * len(FAULTS) + ["win"]
    assert table["score"].is_not_null().sum() == 1
    assert table["text"].str.len_chars().max() < 400  # type: ignore[operator]

    server.answer, before = judging(longer), server.requests
    table = judge_pairs(judge_of(server), pairs, tmp_path, Silent())
    again = {"unreachable": "judged", "timed_out": "judged"}
    assert table["status"].to_list() == [again.get(status, status) for _, status in FAULTS.values()] + ["judged"]
    assert server.requests - before == 1 + 2 * 6
    assert judge_pairs(judge_of(server), pairs, tmp_path, Silent()).equals(table)
    assert server.requests - before == 1 + 2 * 6, "nothing is asked, not even whether the judge is there"


def test_a_server_that_is_busy_is_asked_again(server: WebServer, tmp_path: Path) -> None:
    def answer(body: bytes) -> Sent:
        busy = http(b"", "429 Too Many Requests", "Retry-After: 0"), http(b"", "500 Error", "Retry-After: soon")
        return busy[server.requests % 3] if server.requests % 3 < 2 else judging(longer)(body)

    server.answer = answer
    server.requests = 1  # the check's first try is the 2nd
    table = judge_pairs(judge_of(server), [pair("longer", "short")], tmp_path, Silent())
    assert table["verdict"].to_list() == ["win"]
    assert server.requests == 8


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (http(f"no: Bearer {KEY}".encode(), "401 Unauthorized"), "wants another API key; set SCORER_JUDGE_API_KEY"),
        (http(b"no", "403 Forbidden"), "wants another API key"),
        (http(b"no such model", "404 Not Found"), "has no model 'm', or is no URL .* no such model"),
        (http(b"no such thing", "400 Bad Request"), "answers 400: no such thing"),
        (http(b"busy", "503 Unavailable"), "answers 503: busy"),
        (http(b"<html>"), "not as an OpenAI-compatible server: it is not JSON"),
        (b"", "does not answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "does not answer"),
    ],
)
def test_a_judge_that_is_none_is_one_error_at_the_beginning(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, words: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    JudgeClient(judge_of(server)).check()
    assert server.headers[b"Authorization"] == f"Bearer {KEY}".encode()
    server.answer = lambda _: answer
    for ask in (
        lambda judge: JudgeClient(judge).check(),
        lambda judge: judge_pairs(judge, many(3), tmp_path, Silent()),
    ):
        with pytest.raises(ScorerError, match=words) as raised:
            ask(judge_of(server))
        assert KEY not in str(raised.value)
        assert str(raised.value).startswith(f"judge: {server.url}/v1 ")
    assert not list(tmp_path.iterdir())


def test_what_is_no_server_or_no_key(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScorerError, match="not http://HOST:PORT"):
        JudgeClient(Judge("http://me:secret@host/v1", "m"))
    monkeypatch.setenv("SCORER_JUDGE_API_KEY", "a\nb")
    with pytest.raises(ScorerError, match="SCORER_JUDGE_API_KEY: an HTTP header can't hold"):
        JudgeClient(judge_of(server)).check()
    monkeypatch.delenv("SCORER_JUDGE_API_KEY")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        server.url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ScorerError, match=r"does not answer \(Connection refused\)"):
        JudgeClient(judge_of(server)).check()


def test_a_killed_process_has_kept_its_verdicts(server: WebServer, tmp_path: Path) -> None:
    """Of 60 pairs, whole parts of 20 are kept; the rest is asked for in both orders, after one check."""
    pairs, folder, good = many(60), tmp_path / "verdicts", server.answer
    unheard: list[bytes] = []

    def answer(body: bytes) -> Sent:
        if b"a" * 45 not in body:
            return good(body)
        unheard.append(body)
        return silent()

    server.answer = answer
    command = [sys.executable, "-c", SCRIPT, server.url, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin
        json.dump(list(map(asdict, pairs)), process.stdin)
        process.stdin.close()
        wait(lambda: len(unheard) >= 8 and len(list(folder.glob("part-*"))) == 2)  # of 43 verdicts; all threads wait
        process.kill()
    server.answer, before = good, server.requests
    table = judge_pairs(judge_of(server), pairs, folder, Silent())
    assert set(table["verdict"]) == {"win"}
    assert server.requests - before == 1 + 2 * (60 - 2 * 20)


def test_a_verdict_is_for_its_texts_only(server: WebServer, tmp_path: Path) -> None:
    """A faulty part is told, and judged again, as is a pair of which an answer or the judge's model has changed."""
    pairs = many(25)
    judge_pairs(judge_of(server), pairs, tmp_path, Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    content = bytearray((tmp_path / "part-00001.parquet").read_bytes())
    content[40] ^= 1
    (tmp_path / "part-00001.parquet").write_bytes(content)
    told, before = Told(), server.requests
    assert set(judge_pairs(judge_of(server), pairs, tmp_path, told)["status"]) == {"judged"}
    assert "part-00001.parquet is faulty (its bytes are not those" in told.messages[0]
    assert server.requests - before == 1 + 2 * 5

    pairs[3], before = replace(pairs[3], other="another, much longer answer"), server.requests
    assert judge_pairs(judge_of(server), pairs, tmp_path, Silent())["verdict"][3] == "loss"
    assert server.requests - before == 1 + 2
    other, before = replace(judge_of(server), model="another"), server.requests
    judge_pairs(other, [*pairs[:2], replace(pairs[0], seed=43)], tmp_path, Silent())
    assert server.requests - before == 1 + 2 * 2, "one of the same texts is asked for once"


def test_a_server_that_goes_away_is_not_asked_for_ever(server: WebServer, tmp_path: Path) -> None:
    good, told = server.answer, Told()
    server.answer = lambda body: good(body) if server.requests <= 21 else http(b"", "500 Error")
    table = judge_pairs(judge_of(server, pauses=()), many(100), tmp_path, told)
    assert set(table["status"]) == {"judged", "unreachable"}
    assert server.requests <= 21 + 2 * CONCURRENT_PAIRS + LOST_PAIRS
    assert "the same command judges them" in told.messages[-1]
    server.answer, judged = good, (table["status"] == "judged").sum()
    before = server.requests
    assert set(judge_pairs(judge_of(server), many(100), tmp_path, Silent())["status"]) == {"judged"}
    assert server.requests - before == 1 + 2 * (100 - judged)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 7", (8, 7)),
        ("\n 8.5, 10\r\nThe first", (8.5, 10)),
        ("**8** and **7**.", (8, 7)),
        ("8/10, 7/10", (8, 7)),
        ("[1] 8", None),
        ("10 1\n1 10", (10, 1)),
        ("87", None),
        ("8 7 6", None),
        ("-8 7", None),
        ("Answer 1: 8, answer 2: 7", None),
        ("8" + " " * 200 + "7", None),
        ("", None),
    ],
)
def test_scores_are_those_of_the_first_line(text: str, scores: tuple[float, float] | None) -> None:
    assert read_reply(text).scores == scores


def test_the_prompt_that_a_judge_sees() -> None:
    assert prompt_text(Conversation([{"role": "user", "content": "Why?"}])) == "Why?"
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    assert prompt_text(Conversation([*messages, {"role": "tool", "content": "so"}])) == (
        'user: Why?\n\nassistant: [{"type":"function","function":{"name":"look","arguments":{}}}]\n\ntool: so'
    )
