"""Models without a download: published configurations, and random weights for them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from scorer.models.find import ModelFiles
from scorer.models.load import choose_dtype
from scorer.types import ScorerError

WEIGHTS = "model.safetensors"
OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "activation_function": "relu",
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 24,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
LLAMA_2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "vocab_size": 50257,
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
# From the config.json of openai-community/gpt2, HuggingFaceTB/SmolLM2-135M, facebook/opt-*, meta-llama/Llama-2-*-hf.
SHAPES: dict[str, Mapping[str, Any]] = {
    "tiny": {**GPT_2, "n_embd": 32, "n_layer": 2, "n_head": 2},  # for trying the benchmarks on a CPU
    "gpt2": {**GPT_2, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "smollm2-135m": {
        **LLAMA_2,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "opt-350m": {
        **OPT,
        "hidden_size": 1024,
        "word_embed_proj_dim": 512,
        "ffn_dim": 4096,
        "num_attention_heads": 16,
        "do_layer_norm_before": False,
    },
    "opt-1.3b": {
        **OPT,
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "ffn_dim": 8192,
        "num_attention_heads": 32,
        "do_layer_norm_before": True,
    },
    "llama-2-7b": {
        **LLAMA_2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-2-13b": {
        **LLAMA_2,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}


def shape_config(name: str) -> Any:
    """The transformers configuration of a name in SHAPES or a folder with a config.json; else raises ScorerError."""
    settings = SHAPES.get(name)
    if settings is None:
        path = Path(name) / "config.json"
        if not path.is_file():
            raise ScorerError(f"shape '{name}': not one of {', '.join(SHAPES)}, and not a folder with a config.json")
        settings = json.loads(path.read_text(encoding="utf-8"))
    return AutoConfig.for_model(**settings)


def network(config: Any) -> Any:
    """The causal language model of a configuration on torch's meta device, which has no memory for weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def outline(name: str, folder: Path) -> ModelFiles:
    """The files of a shape, with a sparse file of the size of its 16-bit weights, by which an engine is chosen."""
    config = shape_config(name)
    config.save_pretrained(folder)
    count = network(config).num_parameters()
    header = json.dumps({"weights": {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}).encode()
    with (folder / WEIGHTS).open("wb") as file:  # vLLM parses the header even for dummy weights
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + 2 * count)
    return ModelFiles(name, folder, f"random:{name}", None, "random")


def fill(files: ModelFiles, device: str) -> None:
    """Replace the sparse file by random weights, in the dtype that `device` computes in."""
    (files.path / WEIGHTS).unlink()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(files.path), dtype=getattr(torch, choose_dtype("auto", device))
        )
    model.save_pretrained(files.path, max_shard_size="100GB")
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # for other processes
