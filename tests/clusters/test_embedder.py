"""Embedders of every kind against sentence-transformers' own numbers, and those that are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
from transformers import BertConfig, BertModel

from bench.lib.families import byte_tokenizer
from scorer.clusters.embedder import Embedder
from scorer.config import EmbedderConfig
from scorer.models.find import find_model
from scorer.types import ScorerError

TEXTS = ["a", "The cat sleeps.", "ünïcödé 漢字", "word " * 40, *(f"{i} is {i * i} less {i}" for i in range(40))]
OPTIONS: dict[str, Any] = {"device": "cpu", "local_files_only": True}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
QUIET = """
import json, sys
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
from scorer.clusters.embedder import Embedder
from scorer.config import EmbedderConfig
from scorer.models.find import find_model
from scorer.types import ScorerError
for name in sys.argv[1:]:
    try:
        files = find_model(name, embedder=True)
        print(json.dumps([files.origin, Embedder(files, EmbedderConfig()).embed(["a", ""]).shape, seen]))
    except ScorerError as error:
        print(json.dumps(str(error)))
"""


def transformer(folder: Path) -> Transformer:
    """A random BERT of one token a byte, 64 tokens at most."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=257, max_position_embeddings=64, pad_token_id=256, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return Transformer(str(folder))


def pooled(mode: str) -> Callable[[Path], list[Any]]:
    return lambda folder: [transformer(folder), Pooling(32, mode)]


def dense(folder: Path) -> list[Any]:
    return [*pooled("mean")(folder), Dense(32, 8, activation_function=torch.nn.Identity()), Normalize()]


def static(_: Path) -> list[Any]:
    torch.manual_seed(0)
    return [StaticEmbedding(byte_tokenizer(), embedding_dim=16)]


KINDS: dict[str, Callable[[Path], list[Any]]] = {
    **{mode: pooled(mode) for mode in ("cls", "max", "weightedmean", "lasttoken")},
    "dense": dense,
    "static": static,
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(kind, **options)`: the folder of a new model, as sentence-transformers saves it."""

    def save(kind: str, **options: Any) -> Path:
        folder = tmp_path / "embedder"
        SentenceTransformer(modules=KINDS[kind](tmp_path / "transformer"), device="cpu", **options).save(str(folder))
        return folder

    return save


def embed(folder: Path, texts: list[str] = TEXTS, **options: Any) -> np.ndarray[Any, Any]:
    config = EmbedderConfig(str(folder), **options)
    files = find_model(config.embedder, embedder=True, allow_pickle=config.allow_pickle)
    return Embedder(files, config).embed(texts)


def pickle_weights(folder: Path) -> None:
    safe = folder / "model.safetensors"
    torch.save(load_file(safe), folder / "pytorch_model.bin")
    safe.unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_any_model_gives_what_sentence_transformers_gives(saved: Callable[..., Path], kind: str) -> None:
    folder = saved(kind)
    own = SentenceTransformer(str(folder), **OPTIONS).encode(TEXTS, normalize_embeddings=True)
    found = embed(folder)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, own, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.linalg.matrix_rank(found, tol=1e-3) > 4  # not all alike


def test_the_model_s_default_prompt_and_limit_are_its_own(saved: Callable[..., Path]) -> None:
    plain = embed(saved("cls"))
    folder = saved("cls", prompts={"search": "find: ", "other": "no: "}, default_prompt_name="search")
    embedder = Embedder(find_model(str(folder), embedder=True), EmbedderConfig())
    assert embedder.settings["prompt"] == "find: "
    found = embedder.embed(TEXTS)
    own = SentenceTransformer(str(folder), **OPTIONS).encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(found, own, atol=1e-6)
    assert np.abs(found - plain).max() > 0.01
    assert embedder.tokens == sum(min(64, len(text.encode())) for text in TEXTS)  # 64 by the model's config.json


@pytest.mark.parametrize("kind", ["max", "static"])
def test_of_a_text_the_first_tokens_count(saved: Callable[..., Path], kind: str) -> None:
    folder = saved(kind)
    cut = embed(folder, [text.encode()[:5].decode(errors="ignore") for text in TEXTS if text.isascii()])
    np.testing.assert_allclose(embed(folder, [t for t in TEXTS if t.isascii()], max_tokens=5), cut, atol=1e-6)


def test_a_transformer_in_a_folder_of_its_own(saved: Callable[..., Path]) -> None:
    folder = saved("dense")
    expected, before = embed(folder), find_model(str(folder), embedder=True).revision
    own = folder / "0_Transformer"
    own.mkdir()
    kept = ("modules.json", "config_sentence_transformers.json")
    for path in [path for path in folder.glob("*") if path.is_file() and path.name not in kept]:
        path.rename(own / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = own.name
    (folder / "modules.json").write_text(json.dumps(modules))
    np.testing.assert_allclose(embed(folder), expected, atol=1e-6)
    revisions = {before, find_model(str(folder), embedder=True).revision}
    weights = bytearray((folder / "2_Dense" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "2_Dense" / "model.safetensors").write_bytes(weights)
    assert len(revisions | {find_model(str(folder), embedder=True).revision}) == 3  # of all the folders' content
    pickle_weights(own)
    with pytest.raises(ScorerError, match=r"0_Transformer: its weights are pickled.*--allow-pickle"):
        embed(folder)


def test_pickled_weights_of_a_module_need_leave(saved: Callable[..., Path]) -> None:
    folder = saved("dense")
    expected = embed(folder)
    pickle_weights(folder / "2_Dense")
    with pytest.raises(ScorerError, match=r"2_Dense: its weights are pickled.*--allow-pickle"):
        embed(folder)
    pickle_weights(folder)
    np.testing.assert_allclose(embed(folder, allow_pickle=True), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", None, "not a sentence-transformers model, which has a modules.json"),
        ("modules.json", "[1]", "modules.json: cannot be read"),
        ("modules.json", "[]", "does not load"),
        ("modules.json", '[{"name": "0", "path": "", "type": "own.Module"}]', "needs own.Module.*--trust-remote-code"),
        ("config_sentence_transformers.json", '{"model_type": "CrossEncoder"}', "a CrossEncoder, which does not embed"),
        ("1_Pooling/config.json", None, "1_Pooling: files of the module Pooling are missing"),
        ("1_Pooling/config.json", "{}", "does not load: TypeError"),
        ("2_Dense/model.safetensors", None, "2_Dense: files of the module Dense are missing"),
        ("2_Dense/config.json", "{", "does not load: JSONDecodeError"),
        (
            "2_Dense/config.json",
            '{"in_features": 32, "activation_function": "os.x"}',
            "needs os.x.*--trust-remote-code",
        ),
        ("tokenizer.json", None, "no tokenizer"),
    ],
)
def test_an_unusable_folder_is_named_on_one_line(
    saved: Callable[..., Path], file: str, content: str | None, message: str
) -> None:
    folder = saved("dense")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ScorerError, match=message) as caught:
        embed(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_as_many_layers_as_the_weights_have(saved: Callable[..., Path]) -> None:
    config = saved("cls") / "config.json"
    for layers in (1, 3):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": layers}))
        with pytest.raises(ScorerError, match=f"config.json has {layers} layers, the weights have 2"):
            embed(config.parent)


def test_a_module_s_pickle_is_not_loaded_for_an_index_beside_it(saved: Callable[..., Path]) -> None:
    folder = saved("dense")
    pickle_weights(folder / "2_Dense")
    (folder / "2_Dense" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ScorerError, match=r"2_Dense: its weights are pickled.*--allow-pickle"):
        embed(folder)


def test_a_module_elsewhere_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("dense")
    (folder / "2_Dense").rename(tmp_path / "elsewhere")
    (folder / "2_Dense").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ScorerError, match="its module Dense is outside"):
        embed(folder)


@pytest.mark.slow
def test_nothing_is_printed_nor_asked_of_the_network(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, and a model in the hub's cache; the hub is asked for what that lacks."""
    folder = saved("dense", prompts={"search": "find: "}, default_prompt_name="search")
    home = tmp_path / "hub" / "models--someone--tiny"
    (home / "snapshots").mkdir(parents=True)
    snapshot = folder.rename(home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def found(*names: str) -> list[Any]:
        command = [sys.executable, "-c", QUIET, *names]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert ended.stderr == ""
        return list(map(json.loads, ended.stdout.splitlines()))

    assert found(str(snapshot), "someone/tiny") == [["directory", [2, 8], []], ["hub", [2, 8], []]]
    (snapshot / "2_Dense" / "model.safetensors").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "2_Dense: files of the module Dense are missing" in found("someone/tiny")[0]
