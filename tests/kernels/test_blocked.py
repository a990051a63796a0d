"""The head on CPU: blocked torch against float64, without Triton."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scorer_kernels import Head, blocked, nll_head
from scorer_kernels.reference import reference_nll


def drawn(rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 10_000 + vocab_size)
    hidden = torch.randn(rows, hidden_size, generator=generator) * 2 / hidden_size**0.5
    weight = torch.randn(vocab_size, hidden_size, generator=generator)
    bias = torch.randn(vocab_size, generator=generator)
    return hidden.to(dtype), weight.to(dtype), torch.randint(vocab_size, (rows,), generator=generator), bias.to(dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 60),
    hidden_size=st.integers(1, 100),
    vocab_size=st.integers(1, 300),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    has_bias=st.booleans(),
    scale=st.sampled_from((1.0, 0.125)),
    softcap=st.sampled_from((None, 3.0)),
    cut=st.integers(0, 299),
)
def test_ragged_shapes(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    has_bias: bool,
    scale: float,
    softcap: float | None,
    cut: int,
) -> None:
    hidden, weight, targets, bias = drawn(rows, hidden_size, vocab_size, dtype)
    size = max(vocab_size - cut, 1)
    weight[size:] = torch.nan
    targets %= size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "MAX_BLOCK_ROWS", 25)
        patch.setattr(blocked, "MAX_BLOCK_LOGITS", 1000)
        head = Head(weight, bias if has_bias else None, scale, softcap, size)
        ours = nll_head(hidden, head, targets)
    exact, eager = (reference_nll(hidden, head, targets, d) for d in (torch.float64, dtype))
    assert ours.shape == (rows,)
    assert ours.dtype == torch.float32
    if rows:
        assert (ours - exact).abs().max() <= 1.5 * (eager - exact).abs().max() + 1e-6


def test_a_later_block_far_above_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "MAX_BLOCK_VOCAB", 4)
    hidden = torch.tensor([[1.0], [1.0], [0.0], [-1.0]])
    weight = torch.tensor([-100.0] * 4 + [0.0] * 4 + [100.0, 100.0])[:, None]
    ours = nll_head(hidden, Head(weight), torch.tensor([9, 0, 5, 9]))
    assert ours.tolist() == pytest.approx([math.log(2), 200 + math.log(2), math.log(10), 200 + math.log(4)])
    bias = torch.tensor([-torch.inf] * 5 + [0.0] * 5)
    ours = nll_head(hidden, Head(weight, bias), torch.tensor([9, 0, 5, 9]))
    assert ours.tolist() == pytest.approx([math.log(2), math.inf, math.log(5), 100 + math.log(3)])


def test_a_certain_token_costs_nothing_in_bfloat16() -> None:
    hidden, weight, _, _ = drawn(200, 64, 500, torch.bfloat16)
    hidden = hidden * 10
    exact = hidden.double() @ weight.double().T
    targets = exact.argmax(1)
    ours = nll_head(hidden, Head(weight), targets)
    assert (ours >= -1e-6).all()
    assert torch.allclose(ours.double(), reference_nll(hidden, Head(weight), targets), rtol=0.3, atol=1e-5)


def test_a_target_outside_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _ = drawn(10, 16, 50, torch.float32)
    wrong = targets.clone()
    wrong[[2, 7, 9]] = torch.tensor([-100, 50, 2**62])
    ours = nll_head(hidden, Head(weight), wrong)
    assert ours.isnan().nonzero()[:, 0].tolist() == [2, 7, 9]
    monkeypatch.setenv("SCORER_KERNELS_DEBUG", "1")
    with pytest.raises(IndexError, match="outside the vocabulary's 0 to 49"):
        nll_head(hidden, Head(weight), wrong)


def test_parameters_and_strided_rows_are_taken_as_they_are() -> None:
    hidden, weight, targets, _ = drawn(40, 32, 60, torch.bfloat16)
    every_other = hidden[::2, 8:24]
    trained = torch.nn.Parameter(weight[:, 8:24])
    ours = nll_head(every_other, Head(trained), targets[::2])
    assert not ours.requires_grad
    copied = Head(trained.detach().contiguous())
    assert ours.equal(nll_head(every_other.contiguous(), copied, targets[::2].contiguous()))


def test_triton_is_not_needed_on_cpu() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch, scorer_kernels as k; "
        "print(k.nll_head(torch.ones(1, 4), k.Head(torch.ones(8, 4)), torch.tensor([3])).item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(math.log(8))


def test_triton_refuses_cpu_tensors() -> None:
    program = (
        "import torch, scorer_kernels as k; k.linear_nll(torch.ones(1, 4), k.Head(torch.ones(8, 4)), torch.tensor([3]))"
    )
    environment = {"TRITON_INTERPRET": "0"}
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", "import os; os.environ.update(" + repr(environment) + "); " + program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ValueError: Triton takes CUDA tensors, not cpu's; nll_head takes both" in done.stderr
