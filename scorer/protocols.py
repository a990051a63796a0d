"""Protocols: how a record's text becomes the two token sequences that are scored. All of it is data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Join(StrEnum):
    """How a prompt and its response become one token sequence."""

    RETOKENISED = "retokenised"  # the whole text at once; the response starts at the prompt's own token count
    CONCATENATED = "concatenated"  # ids(prompt) ++ ids(response)


@dataclass(frozen=True, slots=True)
class Template:
    """Prompt text by `str.format` of `instruction` and `input`; `separator` stands before a later turn's prompt."""

    with_input: str
    without_input: str
    separator: str = "\n"


PLAIN = Template("{instruction}\n{input}\n", "{instruction}\n")


ALPACA = Template(  # Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
    separator="\n\n",
)


@dataclass(frozen=True, slots=True)
class AloneView:
    """The response without its prompt.

    `prefix` text stands before it and is not scored. `document_bos` puts the token that separates documents before it,
    so that its first token is scored too. The view is cut to the conditioned view's room for the response,
    `max_length - prompt_tokens`, plus `slack` tokens (which the published scripts leave for the prefix).
    """

    prefix: str = ""
    document_bos: bool = False
    slack: int = 0


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a record's text becomes its two token sequences. It changes the score, so it is named in every manifest."""

    name: str
    source: str
    template: Template | None  # None: the model's own chat template
    alone: AloneView | None  # None: conditioned only
    max_length: int = 1024  # tokens of the conditioned view; cut at the right
    join: Join = Join.RETOKENISED
    score_eos: bool = False  # whether the EOS text follows the response and is scored
    rank_by: str = "ifd"  # the column that `select` ranks by, unless told
    lowest: bool = False  # whether low values of it are worth keeping


CHERRY_ALONE = AloneView(prefix="### Response:", slack=4)
ALIGNED_ALONE = AloneView(document_bos=True, slack=1)

PROTOCOLS: Mapping[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("superfiltering", "arXiv 2402.00530", PLAIN, AloneView(slack=1)),
        Protocol("cherry", "arXiv 2308.12032", ALPACA, CHERRY_ALONE, 512, rank_by="ifd_loss"),
        Protocol("small2large", "arXiv 2402.10430", ALPACA, None, 512, score_eos=True, rank_by="ppl_conditioned"),
        Protocol("aligned", "both views score the same tokens", PLAIN, ALIGNED_ALONE, join=Join.CONCATENATED),
        Protocol("chat", "the model's own chat template", None, ALIGNED_ALONE, join=Join.CONCATENATED),
    )
}
