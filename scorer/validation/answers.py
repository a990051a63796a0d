"""The greedy answers of a model to prompts, by vLLM or by transformers.

Knows how answers are generated; neither where the prompts come from nor what the answers are for.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any

import torch

from scorer.config import ScoreConfig
from scorer.encoding.chat import ChatTemplate, Conversation, stand_in_for
from scorer.engines import vllm as engine
from scorer.engines.choose import context_length
from scorer.engines.packing import padded_batches
from scorer.engines.spans import BatchOutOfMemoryError, convert_errors
from scorer.models.find import ModelFiles, model_settings
from scorer.models.load import choose_device, choose_dtype, load_causal_lm, load_tokenizer
from scorer.models.quiet import loading, quiet
from scorer.runs.progress import Progress
from scorer.types import EngineError, ScorerError, one_of

BATCH_TOKENS = {"cpu": 8192, "cuda": 131072}  # of prompts and answers, with padding: what the KV cache holds
# vLLM starts in half a minute on two cores, and then answers several times as fast: with a model of 135M, 10 answers of
# 80 tokens took 45 s, start included, where transformers took 80.
CPU_PROMPTS = 10
TokenIds = list[int]


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How answers are generated.

    config: the dtype (auto is bfloat16 where the device has it), the device, and what loading the model may do.
    max_tokens: of one answer. by: auto, vllm or transformers.
    """

    config: ScoreConfig
    max_tokens: int = 512
    by: str = "auto"


@dataclass(frozen=True, slots=True)
class _Plan:
    """The model, its configuration with device and dtype resolved, and the tokens that end an answer."""

    files: ModelFiles
    config: ScoreConfig
    options: AnswerOptions
    stop_ids: TokenIds


def answer(
    files: ModelFiles, prompts: Sequence[Conversation], options: AnswerOptions, progress: Progress
) -> list[str | None]:
    """The answer to each prompt, as the model's chat template asks for one; without special tokens.

    None where there can be none: the template refuses the prompt, or the prompt and `max_tokens` do not fit into the
    model's context. Raises ScorerError where the model has no chat template or does not load, EngineError where the
    model or vLLM fails.
    """
    one_of("by", options.by, ("auto", *GENERATORS))
    tokenizer = load_tokenizer(files, trust_remote_code=options.config.trust_remote_code)
    if not tokenizer.chat_template:
        raise ScorerError(f"{files.name} has no chat template to answer with: use a model that is tuned to chat")
    template = ChatTemplate(tokenizer)
    encoded = _encode(tokenizer, template, prompts)
    context = context_length(files)
    most = None if context is None else context - options.max_tokens
    fitting = {i: ids for i, ids in enumerate(encoded) if ids and (most is None or len(ids) <= most)}
    device = choose_device(options.config.device)
    config = replace(options.config, device=device, dtype=choose_dtype(options.config.dtype, device))
    plan = _Plan(files, config, options, _stop_ids(files, tokenizer, template))
    answers: list[str | None] = [None] * len(prompts)
    if not fitting:
        return answers
    by = _choose(plan, len(fitting)) if options.by == "auto" else options.by
    progress.say(f"answering {len(fitting):,} prompts with {files.name} ({by})")
    progress.begin(len(fitting), 0)
    for i, ids in GENERATORS[by](plan, fitting, progress):
        answers[i] = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return answers


def _encode(tokenizer: Any, template: ChatTemplate, prompts: Sequence[Conversation]) -> list[TokenIds]:
    """The tokens of each prompt; none where the template refuses it."""
    texts = [text if isinstance(text, str) else "" for text in template.render(prompts, to_answer=True)]
    with quiet():  # a prompt longer than the model's context is told in another way
        found: list[TokenIds] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return found


def _stop_ids(files: ModelFiles, tokenizer: Any, template: ChatTemplate) -> TokenIds:
    """The tokens that end an answer: the tokenizer's EOS, those of the model, and what the template ends a turn with.

    A base model that was tuned with another model's template may know the last of these only.
    """
    named = [tokenizer.eos_token_id, model_settings(files).get("eos_token_id")]
    if (files.path / "generation_config.json").is_file():
        with loading(files.path, "generation_config.json"):
            from transformers import GenerationConfig

            named.append(GenerationConfig.from_pretrained(files.path, local_files_only=True).eos_token_id)
    asked = Conversation([{"role": "user", "content": "text"}])
    told = {"role": "assistant", "content": stand_in_for(asked)}
    (text,) = template.render([Conversation([*asked.messages, told])])
    after = text.partition(told["content"])[2].strip() if isinstance(text, str) else ""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named.append([i for i in tokenizer(after, add_special_tokens=False)["input_ids"][:1] if i in special])
    return sorted({i for ids in named for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)})


def _choose(plan: _Plan, prompts: int) -> str:
    """vLLM where it is installed, but for a few prompts on a CPU."""
    few = plan.config.device == "cpu" and prompts < CPU_PROMPTS
    return "transformers" if few or engine.vllm_version() is None else "vllm"


def _by_transformers(
    plan: _Plan, prompts: Mapping[int, TokenIds], progress: Progress
) -> Iterator[tuple[int, TokenIds]]:
    """The answers in padded batches of prompts of about one length, the longest first; halved where memory is full."""
    from transformers import GenerationConfig

    model = load_causal_lm(plan.files, plan.config, "sdpa")
    # In place of the model's own, which may ask for sampling or for penalties.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=plan.options.max_tokens,
        eos_token_id=plan.stop_ids,
        pad_token_id=plan.stop_ids[0] if plan.stop_ids else 0,
    )
    lengths = {i: len(ids) + plan.options.max_tokens for i, ids in prompts.items()}
    batches = list(padded_batches(lengths, BATCH_TOKENS[plan.config.device]))[::-1]
    while batches:
        batch = batches.pop()
        try:
            found = _generate(model, [prompts[i] for i in batch], plan)
        except BatchOutOfMemoryError:
            found = []
        if not found:  # outside of the block: the error holds the memory of the failed batch
            if len(batch) == 1:
                raise EngineError(f"answering does not fit in memory: {len(prompts[batch[0]]):,} tokens of a prompt")
            batches += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
            torch.cuda.empty_cache()
            continue
        progress.advance(len(batch), sum(map(len, found)))
        yield from zip(batch, found, strict=True)


def _generate(model: Any, prompts: Sequence[TokenIds], plan: _Plan) -> list[TokenIds]:
    """The tokens of the answers, without the one that ends each. Raises BatchOutOfMemoryError, EngineError."""
    width = max(map(len, prompts))
    with convert_errors(), torch.inference_mode(), quiet():
        ids = torch.tensor([[0] * (width - len(own)) + own for own in prompts], device=plan.config.device)
        mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts], device=plan.config.device)
        rows = model.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()
    stops = set(plan.stop_ids)
    return [row[: next((at for at, token in enumerate(row) if token in stops), len(row))] for row in rows]


def _by_vllm(plan: _Plan, prompts: Mapping[int, TokenIds], progress: Progress) -> Iterator[tuple[int, TokenIds]]:
    """The answers by vLLM in processes of its own, which end with the last answer: other models follow.

    Where `auto` chose vLLM and it does not start, those by transformers.
    """
    with tempfile.TemporaryFile("w+b") as log, engine.make_socket_folder() as sockets:
        try:
            with engine.sockets_in(sockets):
                llm = _start_vllm(plan, max(map(len, prompts.values())) + plan.options.max_tokens, log)
        except ScorerError as error:
            if plan.options.by == "vllm":
                raise
            progress.say(f"{error}; answering with transformers")
            yield from _by_transformers(plan, prompts, progress)
            return
        processes = engine.watched_processes(llm.llm_engine)
        try:
            with engine.convert_errors(log, f"vLLM can't answer with {plan.files.name}", processes):
                from vllm import SamplingParams

                sampling = SamplingParams(
                    temperature=0, max_tokens=plan.options.max_tokens, stop_token_ids=plan.stop_ids, detokenize=False
                )
                asked = [{"prompt_token_ids": ids} for ids in prompts.values()]
                outputs = llm.generate(asked, sampling, use_tqdm=False)
        finally:
            engine.shut_down(llm.llm_engine)
            for process in processes:  # what they hold is free when they have ended
                wait([process], engine.SHUTDOWN_SECONDS)
    for i, output in zip(prompts, outputs, strict=True):
        ids = list(output.outputs[0].token_ids)
        progress.advance(1, len(ids))
        yield i, ids[:-1] if ids and ids[-1] in plan.stop_ids else ids


def _start_vllm(plan: _Plan, length: int, log: Any) -> Any:
    """A vllm.LLM for sequences of up to `length` tokens. Raises ScorerError, EngineError where there can be none."""
    engine.check_vllm()
    engine.set_environment(ScoreConfig())
    arguments: dict[str, Any] = {
        "model": str(plan.files.path),
        "skip_tokenizer_init": True,  # prompts and answers are token ids
        "dtype": plan.config.dtype,
        "trust_remote_code": plan.config.trust_remote_code,
        "load_format": engine.load_format(plan.files, plan.config.allow_pickle),
        "max_model_len": length,
        "generation_config": "vllm",  # not the model's, which may ask for sampling or for penalties
        "disable_log_stats": True,
    }
    if plan.config.device == "cpu":
        # vLLM would reserve nearly all memory, and compile for a minute.
        arguments |= {"kv_cache_memory_bytes": engine.CPU_CACHE_BYTES, "enforce_eager": True}
    else:
        gc.collect()  # what the training of the model left
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        arguments["gpu_memory_utilization"] = 0.9 * free / total
    with engine.redirect_output(log), engine.convert_errors(log, f"vLLM can't run {plan.files.name}"):
        from vllm import LLM

        return LLM(**arguments)


GENERATORS: Mapping[str, Callable[[_Plan, Mapping[int, TokenIds], Progress], Iterator[tuple[int, TokenIds]]]] = {
    "transformers": _by_transformers,
    "vllm": _by_vllm,
}
