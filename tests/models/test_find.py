"""Names to files: folders, the hub's cache, faults; the choice of dtype and device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scorer.config import ScoreConfig
from scorer.engines.vllm import load_format
from scorer.models.find import ModelFiles, find_model, model_settings
from scorer.models.load import choose_device, choose_dtype, load_causal_lm, load_tokenizer
from scorer.types import ScorerError

SMALL = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}


def load(files: ModelFiles, **options: Any) -> Any:
    return load_causal_lm(files, ScoreConfig(dtype="float32", device="cpu", **options), "sdpa")


def load_all(folder: Path) -> None:
    files = find_model(str(folder))
    load(files)
    load_tokenizer(files)


def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(torch.tensor([[1, 2, 3, 4]])).logits
    return result


def tiny_gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **SMALL)).save_pretrained(folder)
    words = WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="?").save_pretrained(folder)
    return folder


def pickled(folder: Path) -> Path:
    """The same model with its weights as PyTorch pickles them."""
    safe = folder / "model.safetensors"
    torch.save(load_file(safe), folder / "pytorch_model.bin")
    safe.unlink()
    return folder


# Names that are nothing


@pytest.mark.parametrize(
    "name", ["no-such-model-of-anyone", "no-one-at-all/no-such", "./absent", "a/b/c", "x{0}y", "a b"]
)
def test_an_unknown_name_fails_at_once_with_the_known_ones(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(ScorerError, match=r"smollm2-135m, all-minilm-l6-v2.*gpt2") as caught:
        find_model(name)
    assert time.monotonic() - start < 60
    assert "\n" not in str(caught.value)
    assert f"'{name}'" in str(caught.value)


def test_a_revision_of_what_has_none_is_refused(tmp_path: Path) -> None:
    for name in ("smollm2-135m", str(tiny_gpt2(tmp_path))):
        with pytest.raises(ScorerError, match="--revision is for models of the hub"):
            find_model(name, revision="main")


# Folders


def test_a_folder_s_revision_is_its_content(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path / "a")
    files = find_model(str(folder))
    assert (files.origin, files.path, files.document_token_id) == ("directory", folder, None)
    assert load_tokenizer(files).convert_tokens_to_ids("b") == 1
    copy = Path(shutil.copytree(folder, tmp_path / "b"))
    (copy / "README.md").write_text("not part of the model")
    assert find_model(str(copy)).revision == files.revision
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert find_model(str(copy)).revision != files.revision


def test_a_llama_in_shards_loads_and_lacks_one_when_one_is_gone(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **SMALL
    )
    made = LlamaForCausalLM(config).eval()
    made.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(find_model(str(tmp_path)))), logits(made))
    half = load_causal_lm(find_model(str(tmp_path)), ScoreConfig(dtype="float16", device="cpu"), "eager")
    assert half.dtype == torch.float16
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ScorerError, match=r"1 weight files are missing, model-0000"):
        find_model(str(tmp_path))


def test_pickled_weights_load_only_if_allowed(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path)
    expected = logits(load(find_model(str(folder))))
    pickled(folder)
    with pytest.raises(ScorerError, match=r"pickled.*--allow-pickle"):
        find_model(str(folder))
    files = find_model(str(folder), allow_pickle=True)
    with pytest.raises(ScorerError, match="--allow-pickle"):
        load(files)
    assert torch.equal(logits(load(files, allow_pickle=True)), expected)
    other = tiny_gpt2(tmp_path / "other")
    shutil.copy(folder / "pytorch_model.bin", other)  # safetensors come first, allowed or not
    found = [load_format(find_model(str(f), allow_pickle=True), allow_pickle=True) for f in (other, folder)]
    assert found == ["safetensors", "auto"]  # what vLLM is told


def test_an_index_of_safetensors_that_are_not_there_loads_no_pickle(tmp_path: Path) -> None:
    folder = pickled(tiny_gpt2(tmp_path))
    index = folder / "model.safetensors.index.json"
    for name, message in (
        ("model-00001-of-00001.safetensors", "1 weight files are missing, model-00001-of-00001.safetensors the first"),
        ("pytorch_model.bin", "names a file that is no safetensors"),
        ("../model.safetensors", "names a file outside its folder"),
        ("/model.safetensors", "names a file outside its folder"),
        ("in/model.safetensors", "names a file outside its folder"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": name}}))
        for allowed in (False, True):
            with pytest.raises(ScorerError, match=message):
                find_model(str(folder), allow_pickle=allowed)


def test_weights_that_two_libraries_would_read_differently_are_refused(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path)
    other, index = folder / "model-00001-of-00001.safetensors", folder / "model.safetensors.index.json"
    shutil.copy(folder / "model.safetensors", other)
    files = find_model(str(folder))
    with pytest.raises(ScorerError, match=rf"{other.name}: vLLM would load it too, beside model.safetensors"):
        load_format(files, allow_pickle=False)
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": other.name}}))
    with pytest.raises(ScorerError, match=r"weights in model.safetensors and in the files of .*remove one of the two"):
        find_model(str(folder))
    index.unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ScorerError, match="it has an adapter"):
        find_model(str(folder))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("transformer.h.1.mlp.c_fc.weight", None, "1 tensors are missing, transformer.h.1.mlp.c_fc.weight the first"),
        ("transformer.h.2.ln_1.weight", [16], "1 tensors are unexpected, transformer.h.2.ln_1.weight the first"),
        ("transformer.wpe.weight", [16, 16], "1 tensors are of another shape, transformer.wpe.weight the first"),
        ("h.0.attn.bias", [1, 1, 32, 32], None),  # as in gpt2's own file
        ("transformer.h.0.attn.masked_bias", [1], None),
        ("transformer.h.0.rotary_emb.inv_freq", [4], None),
        ("lm_head.weight", [32, 16], None),  # tied, yet stored
    ],
)
def test_tensors_are_those_of_the_configuration(
    tmp_path: Path, name: str, shape: list[int] | None, message: str | None
) -> None:
    weights = tiny_gpt2(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, weights, metadata={"format": "pt"})
    if message is None:
        load(find_model(str(tmp_path)))
        return
    with pytest.raises(ScorerError, match=message):
        load(find_model(str(tmp_path)))


@pytest.mark.parametrize(("layers", "message"), [(1, "tensors are unexpected"), (3, "tensors are missing")])
def test_as_many_layers_as_the_weights_have(tmp_path: Path, layers: int, message: str) -> None:
    config = tiny_gpt2(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_layer": layers}))
    with pytest.raises(ScorerError, match=message):
        load(find_model(str(tmp_path)))


def test_the_base_model_s_file_of_the_hub_loads(tmp_path: Path) -> None:
    """As gpt2, opt and others lie there: saved without the language-model head, and so without a prefix."""
    expected = logits(load(find_model(str(tiny_gpt2(tmp_path)))))
    weights = tmp_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(weights).items()}
    save_file(bare | {"h.1.attn.bias": torch.ones(1, 1, 32, 32)}, weights, metadata={"format": "pt"})
    assert torch.equal(logits(load(find_model(str(tmp_path)))), expected)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", "{", r"config\.json: cannot be read \(JSONDecodeError"),
        ("config.json", "[]", r"config\.json: not a JSON object"),
        ("config.json", '{"model_type": "of-no-one"}', "does not load.*of-no-one"),
        ("model.safetensors", None, "no weights"),
        ("model.safetensors", "short", "the weights are truncated"),
        ("model.safetensors", "long enough" * 1000, "does not load.*SafetensorError"),
        ("model.safetensors.index.json", "[1]", "not an index of weights"),
        ("tokenizer.json", None, "no tokenizer"),
        ("tokenizer.json", "{", "the tokenizer does not load"),
        ("config.json", "[" * 100_000, r"config\.json: cannot be read \(RecursionError"),
        ("config.json", '{"model_type": "gpt2", "n_layer": 1000000000000}', r"config\.json: n_layer can't be 10000"),
        ("config.json", '{"model_type": "llama"}', "config.json asks for 6,738,415,616 parameters"),
        ("config.json", '{"model_type": "gpt2", "n_head": 0}', r"config\.json: n_head can't be 0"),
        ("config.json", '{"model_type": "gpt2", "n_layer": "two"}', "does not load"),
        ("config.json", '{"model_type": "gpt2", "vocab_size": -1}', "does not load"),
        ("config.json", '{"auto_map": {"AutoConfig": "a.B"}}', "does not load"),
        ("config.json", '{"model_type": "gpt2", "transformers_weights": "a.safetensors"}', "not supported"),
        ("generation_config.json", "[" * 100_000, "the model does not load"),
        ("model.safetensors", "\x00" * 8, "the weights are truncated"),
        ("model.safetensors", "\x7f" * 9999, "the model does not load"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "the tokenizer does not load"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}', "the tokenizer does not load"),
    ],
)
def test_a_broken_folder_is_named_on_one_line(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    path = tiny_gpt2(tmp_path) / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(ScorerError, match=message) as caught:
        load_all(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path, file: str) -> None:
    path = tiny_gpt2(tmp_path) / file
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(ScorerError, match=rf"{file}: not a file"):
            find_model(str(tmp_path))
        if path.is_dir():
            path.rmdir()


def test_settings_are_an_object_or_refused(tmp_path: Path) -> None:
    files = find_model(str(tiny_gpt2(tmp_path)))
    assert model_settings(files)["n_positions"] == 32
    for content in (b"", b"\xff{}", b"[" * 100_000, b"[1]", b"null"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ScorerError, match="copy the model again") as caught:
            model_settings(files)
        assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
        assert "\n" not in str(caught.value)


# The hub's cache, offline


def test_a_model_in_the_hub_s_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "models--someone--tiny"
    snapshot = tiny_gpt2(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))  # read when the hub's client is imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = (
        "import json, sys\nfrom scorer.models.find import find_model\nfrom scorer.types import ScorerError\n"
        "try:\n    f = find_model('someone/tiny', revision=json.loads(sys.argv[1]))\n"
        "    print(json.dumps([f.origin, str(f.path), f.revision]))\n"
        "except ScorerError as error:\n    print(json.dumps(str(error)))"
    )

    def found(revision: str | None) -> Any:
        command = [sys.executable, "-c", code, json.dumps(revision)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)

    assert found(None) == found(commit) == ["hub", str(snapshot), commit]
    assert "cannot be reached" in found("f" * 40)
    (snapshot / "tokenizer.json").rename(tmp_path / "elsewhere")  # as a program leaves it that asked for weights only
    assert "no tokenizer" in found(None)
    (tmp_path / "elsewhere").rename(snapshot / "tokenizer.json")
    pickled(snapshot)
    assert "--allow-pickle" in found(None)


# Dtype, device, imports


def test_device_and_dtype() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ScorerError, match="no CUDA device"):
            choose_device("cuda")
    with pytest.raises(ScorerError, match="auto, cpu, cuda"):
        choose_device("tpu")
    for dtype in ("bfloat16", "float16", "float32"):
        assert choose_dtype(dtype, "cpu") == dtype
    with pytest.raises(ScorerError, match="bfloat16, float16, float32"):
        choose_dtype("int8", "cpu")


def test_auto_dtype_is_bfloat16_where_the_processor_says_so() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "avx2" not in (text := flags.read_text()):
        pytest.skip("only Linux on x86 lists its instructions so")
    assert choose_dtype("auto", "cpu") == ("bfloat16" if "avx512_bf16" in text or "amx_bf16" in text else "float32")


def test_importing_models_imports_nothing_heavy() -> None:
    code = (
        "import sys, scorer.models.find; print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
