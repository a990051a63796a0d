"""Slices of the vocabulary on CPU, as tensor parallel ranks hold them, against the whole head."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scorer_kernels import Head, merge_nll_partials, nll_head, nll_partials
from scorer_kernels.reference import reference_nll

ROWS, HIDDEN_SIZE, VOCAB_SIZE = 24, 40, 257
SLICES = {
    "whole": (0, 257),
    "halves": (0, 128, 257),
    "uneven": (0, 1, 200, 257),
    "thirds": (0, 86, 172, 257),
}
PADDING = 7  # rows of NaN after each slice, as in a rank's share of a padded vocabulary


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight, bias, and targets in every slice, the first and last token of each included."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, HIDDEN_SIZE, generator=generator) * 3 / HIDDEN_SIZE**0.5
    weight, bias = (
        torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator),
        torch.randn(VOCAB_SIZE, generator=generator),
    )
    edges = [0, 1, 85, 86, 127, 128, 171, 172, 199, 200, 256]
    targets = torch.cat((torch.tensor(edges), torch.randint(VOCAB_SIZE, (ROWS - len(edges),), generator=generator)))
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def in_slices(bounds: tuple[int, ...], hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """The partials of all slices, [P, 3, N], each from a weight of its own with padding behind it."""
    parts = []
    for start, end in pairwise(bounds):
        weight = torch.nn.functional.pad(head.weight[start:end], (0, 0, 0, PADDING), value=math.nan)
        bias = (
            None if head.bias is None else torch.nn.functional.pad(head.bias[start:end], (0, PADDING), value=math.nan)
        )
        own = replace(head, weight=weight, bias=bias, vocab_size=end - start, vocab_start=start)
        parts.append(nll_partials(hidden, own, targets))
    return torch.stack(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("bounds", SLICES.values(), ids=SLICES)
def test_slices_merged_are_the_whole_head(
    bounds: tuple[int, ...], has_bias: bool, softcap: float | None, scale: float, dtype: torch.dtype
) -> None:
    hidden, weight, bias, targets = drawn(dtype)
    head = Head(weight, bias if has_bias else None, scale, softcap)
    partials = in_slices(bounds, hidden, head, targets)
    assert partials.dtype == torch.float32
    assert partials.shape == (len(bounds) - 1, 3, ROWS)
    assert ((~partials[:, 2].isnan()).sum(0) == 1).all()  # each target lies in one slice
    merged = merge_nll_partials(partials)
    assert merged.dtype == torch.float32
    # In bfloat16 the logits of a block are rounded, in the whole head as in its slices, except the target's.
    near = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(merged, nll_head(hidden, head, targets), rtol=near, atol=near)
    exact = reference_nll(hidden, head, targets)
    torch.testing.assert_close(merged.double(), exact, rtol=near, atol=near)


def test_the_order_of_the_slices_does_not_matter() -> None:
    hidden, weight, bias, targets = drawn(torch.float32)
    partials = in_slices(SLICES["uneven"], hidden, Head(weight, bias), targets)
    torch.testing.assert_close(merge_nll_partials(partials.flip(0)), merge_nll_partials(partials), rtol=1e-6, atol=0)


def test_by_hand() -> None:
    """Logits 0, ln 2 | ln 3, ln 4: probabilities 1/10, 2/10 | 3/10, 4/10."""
    hidden = torch.ones(4, 1)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()[:, None]
    partials = in_slices((0, 2, 4), hidden, Head(weight), torch.arange(4))
    assert (partials[:, 0] + partials[:, 1].log()).exp()[:, 0].tolist() == pytest.approx([3.0, 7.0])
    assert partials[0, 2, :2].tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)
    assert partials[0, 2].isnan().tolist() == [False, False, True, True]
    assert merge_nll_partials(partials).tolist() == pytest.approx([-math.log(n / 10) for n in (1, 2, 3, 4)], rel=1e-6)


def test_a_slice_far_below_another_or_impossible_adds_nothing() -> None:
    hidden = torch.ones(2, 1)
    weight = torch.tensor([-300.0, -300.0, 300.0, 300.0])[:, None]
    targets = torch.tensor([3, 0])
    far = merge_nll_partials(in_slices((0, 2, 4), hidden, Head(weight), targets))
    assert far.tolist() == pytest.approx([math.log(2), 600 + math.log(2)], abs=1e-4)  # float32 near 300
    bias = torch.tensor([-math.inf, -math.inf, 0.0, 0.0])
    never = merge_nll_partials(in_slices((0, 2, 4), hidden, Head(weight, bias), targets))
    assert never.tolist() == pytest.approx([math.log(2), math.inf], abs=1e-4)


def test_a_target_of_no_slice_is_undefined_and_harms_no_other() -> None:
    hidden, weight, _, targets = drawn(torch.float32)
    wrong = targets.clone()
    wrong[[0, 5, 9]] = torch.tensor([-1, VOCAB_SIZE, 2**62])
    merged = merge_nll_partials(in_slices(SLICES["thirds"], hidden, Head(weight), wrong))
    assert merged.isnan().nonzero()[:, 0].tolist() == [0, 5, 9]
    right = [i for i in range(ROWS) if i not in (0, 5, 9)]
    torch.testing.assert_close(merged[right], nll_head(hidden, Head(weight), targets)[right], rtol=1e-5, atol=1e-5)
    # Padding holds no token, even where the next slice's ids would begin.
    beside = merge_nll_partials(in_slices((0, 86), hidden, Head(weight), torch.full((ROWS,), 86)))
    assert beside.isnan().all()


def test_undefined_logits_stay_undefined() -> None:
    hidden, weight, _, targets = drawn(torch.float32)
    hidden[4] = math.nan
    merged = merge_nll_partials(in_slices(SLICES["halves"], hidden, Head(weight), targets))
    assert merged.isnan().nonzero()[:, 0].tolist() == [4]
