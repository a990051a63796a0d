"""Chat templates that are hostile or broken: each ends soon, in little memory, as an error of its own."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from bench.lib.families import byte_tokenizer
from scorer.encoding import chat
from scorer.encoding.chat import ChatTemplate, Conversation
from scorer.encoding.templates import ChatTemplateError, EndlessTemplateError, Renderer
from scorer.types import EngineError, ScorerError

NUMBERS = "{% set r = range(99999) %}"
ENDLESS = NUMBERS + "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
DOUBLES = "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = FORM %}{% endfor %}{{ n.s | length }}"
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(seconds=1)


def render(renderer: Renderer, source: str, **variables: Any) -> str:
    (answer,) = renderer.render([(source, variables)], patience=2)
    if isinstance(answer, ChatTemplateError):
        raise answer
    return answer


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**11 }}",
        "{{ ('x',) * 10**11 }}",
        "{{ '%100000000000d' % 1 }}",
        "{{ '%*d' % (100000000000, 1) }}",
        "{{ '{:>100000000000}'.format(1) }}",
        "{{ 'x' | center(10**11) }}",
        "{{ 'x'.ljust(10**11) }}",
        "{{ 'a\\n' | indent(10**11) }}",
        "{{ [1] | tojson(indent=10**11) }}",
        "{{ [1] | batch(10**11, 0) | list }}",
        "{{ [1] | slice(10**11) | list }}",
        DOUBLES.replace("FORM", "n.s ~ n.s"),
        DOUBLES.replace("FORM", "n.s + n.s"),
        DOUBLES.replace("FORM", "[n.s, n.s] | join"),
        DOUBLES.replace("FORM", "n.s.replace('x', 'xx')"),
        DOUBLES.replace("FORM", "[n.s, n.s]").replace("length", "tojson"),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
        "{{ " + "-" * 50_000 + "1 }}",
        "{% if %}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no') }}",
        "{{ raise_exception('\ud800') }}",
        "{{ 'a\ud800' }}",
        "{{ 'x' * 2000000 }}",  # twice the text that a template may add
    ],
)
def test_a_text_that_cannot_be_is_refused(renderer: Renderer, source: str) -> None:
    start = time.monotonic()
    with pytest.raises(ChatTemplateError):
        render(renderer, source)
    assert time.monotonic() - start < 60
    assert render(renderer, "{{ a }}", a="still here") == "still here"


@pytest.mark.parametrize("source", [ENDLESS, NUMBERS + "{{ 3 ** (7 ** 20) }}"])
def test_a_rendering_without_an_end_is_ended(renderer: Renderer, source: str) -> None:
    with pytest.raises(EndlessTemplateError, match="computes longer than 1 s"):
        render(renderer, source)
    assert render(renderer, "{{ a }}", a="still here") == "still here"


def test_a_template_without_an_end_ends_the_run(monkeypatch: pytest.MonkeyPatch, renderer: Renderer) -> None:
    monkeypatch.setattr(chat, "RENDERER", renderer)
    monkeypatch.setattr(chat, "ENDLESS", 2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ENDLESS
    template, talk = ChatTemplate(tokenizer), Conversation([USER, ANSWER])
    assert isinstance(template.render([talk])[0], EndlessTemplateError)
    with pytest.raises(ScorerError, match="the model's chat template has no end"):
        template.split([talk] * 100)


def test_one_rendering_in_many_fails_alone(renderer: Renderer) -> None:
    sources = {3: ENDLESS, 5: "{{ raise_exception('no') }}", 400: "{{ 'x' * 10**11 }}"}
    requests = [(sources.get(i, "{{ i }}"), {"i": i, "more": {1, 2}}) for i in range(600)]
    requests[7][1]["i"] = iter([])  # can't be pickled
    answers = renderer.render(requests, patience=2)
    wrong = {i: answer for i, answer in enumerate(answers) if isinstance(answer, ChatTemplateError)}
    assert sorted(wrong) == [3, 5, 400]
    assert isinstance(wrong[3], EndlessTemplateError)
    assert [answer for i, answer in enumerate(answers) if i not in (*wrong, 7)] == [
        str(i) for i in range(600) if i not in (*wrong, 7)
    ]


def test_a_long_conversation_is_whole(renderer: Renderer) -> None:
    messages = [{"role": "user", "content": f"{i}-" + "wört " * 400} for i in range(2000)]  # 4 MB
    text = render(renderer, "{% for m in messages %}{{ m.content }}{{ m | tojson }}{% endfor %}", messages=messages)
    assert text.startswith("0-wört ")
    assert text.count("wört") == 2 * 2000 * 400


def test_a_process_that_another_program_kills_is_not_the_template_s_fault(renderer: Renderer) -> None:
    render(renderer, "")
    assert renderer._process is not None
    os.kill(renderer._process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="was ended; run the same command again"):
        render(renderer, "")
    assert render(renderer, "{{ a }}", a="still here") == "still here"
