"""A model's local files -> tokenizer and network; the choice of device and dtype."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scorer.config import DEVICES, DTYPES, ScoreConfig
from scorer.models.find import ModelFiles, model_settings
from scorer.models.folders import check_config, check_tokenizer, weight_files
from scorer.models.quiet import loading
from scorer.types import ScorerError, one_of

OLD_BUFFERS = re.compile(r"\.(masked_bias|attn\.bias|rotary_emb\.inv_freq)$")  # constants that were once saved


def choose_device(device: str) -> str:
    """`cpu` or `cuda`; auto is cuda if torch finds a device. Raises ScorerError for cuda without a device."""
    import torch

    one_of("device", device, DEVICES)
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ScorerError("device: torch finds no CUDA device here; use --device cpu, or install a CUDA build of torch")
    return ("cuda" if available else "cpu") if device == "auto" else device


def choose_dtype(dtype: str, device: str) -> str:
    """The name of the dtype; auto is bfloat16 if `device` has instructions for it, else float32.

    Emulated bfloat16 is slower than float32. oneDNN reports bfloat16 support for any AVX-512, so on x86 the
    instructions are checked here (AVX512-BF16, AMX).
    """
    import torch

    one_of("dtype", dtype, DTYPES)
    if dtype != "auto":
        return dtype
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif platform.machine().lower() in ("arm64", "aarch64"):
        onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        fast = onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def load_tokenizer(files: ModelFiles, *, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer. Raises ScorerError if there is none or it does not load."""
    check_tokenizer(files.path)
    with loading(files.path, "tokenizer"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(files.path, trust_remote_code=trust_remote_code, local_files_only=True)


def load_causal_lm(files: ModelFiles, config: ScoreConfig, attention: str) -> Any:
    """The transformers model in the dtype and on the device of `config`, neither auto; in eval mode, without gradients.

    Raises ScorerError if it does not load, or if its tensors are not those of its configuration.
    """
    check_config(files.path)
    check_causal(files)
    weights = weight_files(files.path, config.allow_pickle)
    with loading(files.path):
        import torch
        from transformers import AutoModelForCausalLM

        _check_size(files, weights, trust_remote_code=config.trust_remote_code)
        model, info = AutoModelForCausalLM.from_pretrained(
            files.path,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
            use_safetensors=weights[0].suffix == ".safetensors",
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
        )
        _check_tensors(files, type(model).__name__, info)
        return model.to(config.device).eval().requires_grad_(False)


def check_causal(files: ModelFiles) -> None:
    """Raise ScorerError for an encoder, which transformers loads as if it did not see the tokens that follow."""
    kinds = model_settings(files).get("architectures") or []
    if masked := [kind for kind in kinds if isinstance(kind, str) and kind.endswith("ForMaskedLM")]:
        raise ScorerError(
            f"{files.name} is no causal language model ({masked[0]}): choose one that predicts what follows"
        )


def _check_size(files: ModelFiles, weights: Sequence[Path], *, trust_remote_code: bool) -> None:
    """Raise ScorerError where the configuration asks for far more parameters than the weights can hold.

    transformers would make them up, in memory that this machine may not have, before it says which are missing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(files.path, trust_remote_code=trust_remote_code, local_files_only=True)
    with torch.device("meta"):  # where tensors take no memory
        network = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    asked = sum(parameter.numel() for parameter in network.parameters())
    held = 2 * sum(path.stat().st_size for path in weights)  # parameters of four bits, the smallest in use
    if asked > held:
        raise ScorerError(
            f"{files.path}: config.json asks for {asked:,} parameters, and the weights hold at most {held:,}: "
            "they are not of one model, or the weights are truncated; copy the model again"
        )


def _check_tensors(files: ModelFiles, kind: str, info: Mapping[str, Any]) -> None:
    """Raise ScorerError where the tensors of the files are not those of the configuration.

    transformers makes up those that are missing, and leaves out those that it doesn't know; `info` has neither what is
    tied nor what the class declares of no importance.
    """
    wrong = {
        "missing": info["missing_keys"],
        "unexpected": {name for name in info["unexpected_keys"] if not OLD_BUFFERS.search(name)},
        "of another shape": {name for name, *_ in info["mismatched_keys"]},
    }
    for what, names in wrong.items():
        if names:
            raise ScorerError(
                f"{files.path}: {len(names)} tensors are {what}, {min(names)} the first: "
                f"config.json and the weights are not those of one causal language model ({kind})"
            )
