"""Tiny random models of every packed family, with a byte-level tokenizer: for tests, and for checks on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from scorer.models.find import ModelFiles, find_model

# The 256 bytes, then the document separator: every text has as many tokens as it has UTF-8 bytes.
VOCABULARY = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<|end|>": 256}
SIZES = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
LLAMA = {
    **SIZES,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # of 32, the least that vLLM's attention on a CPU takes
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 50}
GPT2 = {**SIZES, "n_embd": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
OPT = {**SIZES, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "init_std": 0.3}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(**GPT2, n_positions=1024),
    "opt": lambda: OPTConfig(**OPT, hidden_size=64, word_embed_proj_dim=64),
    # as OPT-350M: narrower embeddings than hidden states, and the norm after each block
    "opt-projected": lambda: OPTConfig(**OPT, hidden_size=64, word_embed_proj_dim=32, do_layer_norm_before=False),
    "llama": lambda: LlamaConfig(**LLAMA),
    "qwen2": lambda: Qwen2Config(**LLAMA),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=32),
    "gpt_neox": lambda: GPTNeoXConfig(**LLAMA, rotary_pct=0.25),
    "mistral": lambda: MistralConfig(**LLAMA, sliding_window=50),
    "gemma2": lambda: Gemma2Config(**LLAMA, **GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**LLAMA, **GEMMA),
    "olmo2": lambda: Olmo2Config(**LLAMA),
    "phi3": lambda: Phi3Config(**LLAMA, sliding_window=50),
    "smollm3": lambda: SmolLM3Config(**LLAMA, no_rope_layers=[1, 0]),
    "granite": lambda: GraniteConfig(
        **LLAMA, embedding_multiplier=3.0, attention_multiplier=0.1, residual_multiplier=0.5, logits_scaling=4.0
    ),
    "falcon": lambda: FalconConfig(**LLAMA),
    "falcon-grouped": lambda: FalconConfig(**LLAMA, new_decoder_architecture=True, num_kv_heads=2),
    "gpt_oss": lambda: GptOssConfig(
        **LLAMA, head_dim=32, sliding_window=50, num_local_experts=4, num_experts_per_tok=2
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; no BOS is added."""
    tokenizer = Tokenizer(BPE(VOCABULARY, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def make(family: str, folder: Path) -> ModelFiles:
    """The files of a random model, written to `folder`; its weights are large enough for NLLs that differ."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[family]()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return find_model(str(folder))
