"""The Triton kernels against float64, with TRITON_INTERPRET=1; all memory is NaN first.

tests/kernels/test_interpreted.py runs this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scorer_kernels import Head, linear_nll, linear_nll_partials, merge_partials, sample_ifd, segment_nll, table
from scorer_kernels.reference import reference_ifd, reference_nll, reference_segment_nll

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of exp(-inf) and log(0)

SMALL = table.Config(16, 32, 16, warps=4, stages=2)
TMA = replace(SMALL, tma=True)
BOTH = pytest.mark.parametrize("config", [SMALL, TMA], ids=["pointers", "tma"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def drawn(rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, targets and bias, for logits of about -8 to 8."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator) * 2 / hidden_size**0.5
    weight = torch.randn(vocab_size, hidden_size, generator=generator)
    bias = torch.randn(vocab_size, generator=generator)
    return hidden.to(dtype), weight.to(dtype), torch.randint(vocab_size, (rows,), generator=generator), bias.to(dtype)


def assert_as_good_as_eager(ours: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor) -> None:
    """Our largest error is at most 1.5 times eager torch's in the same dtype, plus 1e-6."""
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    if len(exact):
        assert (ours - exact).abs().max() <= 1.5 * (eager - exact).abs().max() + 1e-6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 50),
    hidden_size=st.integers(1, 70) | st.integers(1, 9).map(lambda n: 8 * n),
    vocab_size=st.integers(1, 150),
    config=st.sampled_from((SMALL, TMA)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    has_bias=st.booleans(),
    scale=st.sampled_from((1.0, 0.125)),
    softcap=st.sampled_from((None, 3.0)),
    padding=st.integers(0, 40),
)
def test_ragged_shapes(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    config: table.Config,
    dtype: torch.dtype,
    seed: int,
    has_bias: bool,
    scale: float,
    softcap: float | None,
    padding: int,
) -> None:
    hidden, weight, targets, bias = drawn(rows, hidden_size, vocab_size, dtype, seed)
    padded = torch.cat([weight, weight.new_full((padding, hidden_size), torch.nan)])
    padded_bias = torch.cat([bias, bias.new_full((padding,), torch.nan)]) if has_bias else None
    head = Head(padded, padded_bias, scale, softcap, vocab_size)
    ours = linear_nll(hidden, head, targets, config=config)
    plain = Head(weight, bias if has_bias else None, scale, softcap)
    exact, eager = (reference_nll(hidden, plain, targets, d) for d in (torch.float64, dtype))
    assert_as_good_as_eager(ours, exact, eager)


WIDE = table.Config(16, 1024, 64, warps=4, stages=2)


@pytest.mark.parametrize(
    ("rows", "hidden_size", "vocab_size", "config"),
    [
        (1, 576, 500, None),
        (3, 768, 7, None),
        (130, 512, 300, None),
        (65, 896, 130, replace(table.FALLBACK[2], tma=True)),
        (2, 100, 50257, WIDE),
        (2, 64, 49152, replace(WIDE, tma=True)),
        (2, 4096, 70, None),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_shapes_of_real_models(
    rows: int, hidden_size: int, vocab_size: int, config: table.Config | None, dtype: torch.dtype
) -> None:
    hidden, weight, targets, _ = drawn(rows, hidden_size, vocab_size, dtype, 0)
    ours = linear_nll(hidden, Head(weight), targets, config=config)
    exact, eager = (reference_nll(hidden, Head(weight), targets, d) for d in (torch.float64, dtype))
    assert_as_good_as_eager(ours, exact, eager)
    assert ours.equal(linear_nll(hidden, Head(weight), targets, config=config)), "the same bits from run to run"


@pytest.mark.parametrize("row_blocks_in_cache", [1, 2, 3, 100])
def test_programs_in_groups_cover_all_rows_and_tokens(
    row_blocks_in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets, _ = drawn(90, 20, 300, torch.float32, 1)
    monkeypatch.setattr(table, "L2_BYTES", row_blocks_in_cache * SMALL.block_m * 20 * 4)
    assert table.plan_grid(90, 20, 300, 4, SMALL, 4).group == min(row_blocks_in_cache, 6)
    ours = linear_nll(hidden, Head(weight), targets, config=SMALL)
    assert torch.allclose(ours.double(), reference_nll(hidden, Head(weight), targets), rtol=0, atol=2e-6)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 8192), st.integers(1, 260_000), st.integers(1, 160))
def test_a_plan_has_no_empty_split(rows: int, hidden_size: int, vocab_size: int, processors: int) -> None:
    config = table.Config(128, 256, 64, 8, 4)
    plan = table.plan_grid(rows, hidden_size, vocab_size, 2, config, processors)
    tiles = -(-vocab_size // 256)
    assert (plan.splits - 1) * plan.tiles_per_split < tiles <= plan.splits * plan.tiles_per_split
    assert plan.row_blocks == -(-rows // 128)
    assert 1 <= plan.group <= plan.row_blocks


def test_plans_fill_an_h100() -> None:
    config = table.config_for((9, 0), 2, 768)
    one_row = table.plan_grid(1, 768, 50257, 2, config, 132)
    assert (one_row.splits, one_row.tiles_per_split) == (99, 2)  # 197 tiles: no way to end after one
    many = table.plan_grid(65536, 768, 50257, 2, config, 132)
    waves = -(-many.row_blocks * many.splits // 132)
    assert many.row_blocks * 197 / (waves * many.tiles_per_split * 132) > 0.95
    assert many.splits * 8 * 65536 < 0.01 * 65536 * 50257 * 2, "partials are under 1 % of the logits"


def test_layouts_that_tma_cannot_read_are_read_by_pointers() -> None:
    hidden, weight, targets, _ = drawn(33, 24, 90, torch.bfloat16, 5)
    exact = linear_nll(hidden, Head(weight), targets, config=SMALL)
    assert linear_nll(hidden, Head(weight), targets, config=TMA).equal(exact)
    for before, after in ((8, 0), (1, 7), (0, 1)):  # by TMA; from an odd address; with an odd stride
        wide_hidden, wide_weight = (torch.nn.functional.pad(x, (before, after)) for x in (hidden, weight))
        columns = slice(before, before + 24)
        assert linear_nll(wide_hidden[:, columns], Head(weight), targets, config=TMA).equal(exact)
        assert linear_nll(hidden, Head(wide_weight[:, columns]), targets, config=TMA).equal(exact)
    one = linear_nll(hidden[:1].expand(33, -1), Head(weight), targets[:1].expand(33).contiguous(), config=TMA)
    assert one.equal(exact[:1].expand(33))


@BOTH
def test_logits_of_100_ties_and_minus_infinity(config: table.Config) -> None:
    hidden = torch.eye(16)[:4] * torch.tensor([[100.0], [100.0], [-100.0], [0.0]])
    weight = torch.zeros(200, 16)
    weight[150, 0] = 1.0  # row 0: one logit of 100 in the last split, zeros elsewhere
    weight[:, 1] = 1.0  # row 1: all tied at 100
    weight[:, 2] = torch.tensor([1.0, -1.0]).repeat(100)  # row 2: -100, 100, -100, ...
    bias = torch.zeros(200)
    targets = torch.tensor([150, 0, 0, 3])
    ours = linear_nll(hidden, Head(weight, bias), targets, config=config)
    assert ours.tolist() == pytest.approx([0.0, math.log(200), 200 + math.log(100), math.log(200)], abs=2e-5)
    assert linear_nll(hidden, Head(weight), torch.tensor([0, 1, 1, 0]), config=config).tolist() == pytest.approx(
        [100.0, math.log(200), math.log(100), math.log(200)], abs=2e-5
    )
    for impossible in (torch.finfo(torch.float32).min, -torch.inf):
        bias[:180] = impossible  # whole tiles, the first ones among them, and a part of one
        masked = linear_nll(hidden, Head(weight, bias), torch.tensor([199, 199, 199, 3]), config=config)
        assert masked[:3].tolist() == pytest.approx([math.log(20), math.log(20), math.log(10)], abs=2e-5)
        assert masked[3] == -impossible
        nothing = linear_nll(hidden, Head(weight, torch.full_like(bias, impossible)), targets, config=config)
        assert not nothing.isfinite().any()
    hidden[1] = math.nan
    assert linear_nll(hidden, Head(weight), targets, config=config).isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_certain_token_never_costs_less_than_nothing(dtype: torch.dtype) -> None:
    hidden, weight, _, _ = drawn(64, 50, 40, dtype, 2)
    hidden = hidden * 20
    targets = (hidden.double() @ weight.double().T).argmax(1)
    ours = linear_nll(hidden, Head(weight), targets, config=SMALL)
    assert (ours >= 0).all()
    assert torch.allclose(ours.double(), reference_nll(hidden, Head(weight), targets), rtol=1e-5, atol=5e-5)


def test_a_target_outside_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _ = drawn(20, 16, 50, torch.float32, 3)
    wrong = targets.clone()
    wrong[[2, 7, 8, 19]] = torch.tensor([-100, 50, 2**62, -(2**62)])
    ours = linear_nll(hidden, Head(weight), wrong, config=SMALL)
    assert ours.isnan().nonzero()[:, 0].tolist() == [2, 7, 8, 19]
    right = ~ours.isnan()
    assert ours[right].equal(linear_nll(hidden, Head(weight), targets, config=SMALL)[right])
    monkeypatch.setenv("SCORER_KERNELS_DEBUG", "1")
    with pytest.raises(IndexError, match=r"outside the vocabulary's 0 to 49"):
        linear_nll(hidden, Head(weight), wrong, config=SMALL)
    with pytest.raises(IndexError, match=r"0 to 9"):
        linear_nll(hidden, Head(weight, vocab_size=10), targets, config=SMALL)


def test_wrong_tensors_are_refused() -> None:
    hidden, weight, targets, bias = drawn(4, 8, 9, torch.float32, 0)
    for wrong in (
        lambda: linear_nll(hidden, Head(weight[:, :7]), targets),
        lambda: linear_nll(hidden, Head(weight.bfloat16()), targets),
        lambda: linear_nll(hidden, Head(weight), targets.int()),
        lambda: linear_nll(hidden, Head(weight), targets[:3]),
        lambda: linear_nll(hidden, Head(weight.T.contiguous().T), targets),
        lambda: linear_nll(hidden, Head(weight, vocab_start=1), targets),
        lambda: Head(weight, bias[:8]),
        lambda: Head(weight, vocab_size=10),
        lambda: Head(weight, softcap=0.0),
        lambda: Head(weight.double()),
        lambda: merge_partials(torch.zeros(3, 4)),
        lambda: segment_nll(torch.zeros(4).double(), torch.tensor([0, 4])),
        lambda: sample_ifd(torch.zeros(4), torch.tensor([[0, 4]]), torch.tensor([[0, 1], [1, 4]])),
    ):
        with pytest.raises(AssertionError, match=r"not|contiguous"):
            wrong()


@BOTH
def test_slices_of_the_vocabulary_merge(config: table.Config) -> None:
    hidden, weight, targets, bias = drawn(33, 24, 90, torch.bfloat16, 4)
    targets[0] = 95
    slices = [(0, 40), (40, 41), (41, 90)]
    partials = [
        linear_nll_partials(hidden, Head(weight[a:b], bias[a:b], softcap=3.0, vocab_start=a), targets, config=config)
        for a, b in slices
    ]
    for (a, b), (largest, total, logit) in zip(slices, partials, strict=True):
        x = 3 * torch.tanh((hidden.double() @ weight[a:b].double().T + bias[a:b]) / 3)
        assert torch.allclose(largest.double(), x.amax(1), atol=1e-6)
        assert torch.allclose(total.double(), (x - x.amax(1, keepdim=True)).exp().sum(1), rtol=1e-5)
        assert logit.isnan().equal((targets < a) | (targets >= b))
    merged = merge_partials(torch.stack(partials))
    exact = reference_nll(hidden[1:], Head(weight, bias, softcap=3.0), targets[1:])
    assert torch.allclose(merged[1:].double(), exact, rtol=0, atol=2e-6)
    assert merged[0].isnan(), "no slice holds token 95"


def test_no_rows() -> None:
    hidden, weight, targets, _ = drawn(0, 8, 9, torch.float32, 0)
    assert linear_nll(hidden, Head(weight), targets).shape == (0,)
    assert merge_partials(linear_nll_partials(hidden, Head(weight), targets)[None]).shape == (0,)
    assert [x.tolist() for x in segment_nll(torch.zeros(0), torch.tensor([0]))] == [[], []]
    assert sample_ifd(torch.zeros(0), *torch.zeros(2, 0, 2, dtype=torch.int64)).ifd.shape == (0,)


def test_segments_sum_and_count() -> None:
    nll = torch.tensor([1.0, 2.0, 3.0, 4.0])
    sums, counts = segment_nll(nll, torch.tensor([0, 1, 1, 4]))
    assert (sums.tolist(), counts.tolist()) == ([1.0, 0.0, 9.0], [1, 0, 3])
    nll = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 7, 7, 135, 136, 600, 1000])
    sums, counts = segment_nll(nll, offsets)
    exact, lengths = reference_segment_nll(nll, offsets)
    assert torch.allclose(sums, exact, rtol=1e-14)
    assert counts.equal(lengths)
    assert sums.equal(segment_nll(nll, offsets)[0])


def test_offsets_outside_the_tokens_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    nll, offsets = torch.ones(4), torch.tensor([-(2**40), 2, 2**40, 1])
    sums, counts = segment_nll(nll, offsets)
    assert (sums.tolist(), counts.tolist()) == ([2.0, 2.0, 0.0], [2, 2, 0])
    monkeypatch.setenv("SCORER_KERNELS_DEBUG", "1")
    with pytest.raises(IndexError, match="outside the 4 tokens"):
        segment_nll(nll, offsets)


def test_ifd_of_samples() -> None:
    nll = torch.tensor([1.0, 2.0, 3.0, 2.0, 2.0, 200.0, 0.0, torch.nan])
    conditioned = torch.tensor([[0, 2], [3, 5], [2, 2], [5, 6], [6, 7], [7, 8]])
    alone = torch.tensor([[2, 3], [3, 5], [0, 3], [6, 7], [5, 6], [0, 1]])
    found = sample_ifd(nll, conditioned, alone)
    assert found.sum_conditioned[:5].tolist() == [3.0, 4.0, 0.0, 200.0, 0.0]
    assert found.count_conditioned.tolist() == [2, 2, 0, 1, 1, 1]
    assert found.sum_alone.tolist() == [3.0, 4.0, 6.0, 0.0, 200.0, 1.0]
    assert found.count_alone.tolist() == [1, 2, 3, 1, 1, 1]
    assert found.ifd[:2].tolist() == pytest.approx([math.exp(1.5 - 3.0), 1.0])
    assert found.ifd[[2, 5]].isnan().all(), "no tokens, and NaN among the tokens"
    assert found.ifd[3:5].tolist() == [math.inf, 0.0]
    assert torch.allclose(found.ifd.double(), reference_ifd(nll, conditioned, alone).float().double(), equal_nan=True)
