"""Embeddings against sentence-transformers' own numbers, and clusters and flags that can be told by reading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from scorer.clusters import embeddings
from scorer.clusters.cluster import BLOCK_ROWS, cluster, kmeans, near_duplicates
from scorer.clusters.embedder import Embedder
from scorer.config import EmbedderConfig
from scorer.models.find import ModelFiles, find_model
from scorer.runs.directory import Run
from scorer.runs.run import score
from scorer.types import ScorerError
from tests.lib.command import Commands, end, start

Write = Callable[..., Path]

# The first four numbers of each embedding as sentence-transformers 6.2.0 gives them, normalised.
KNOWN = {
    "The cat sleeps on the warm windowsill.": (0.107489, -0.011250, -0.033663, 0.145238),
    "Bake the bread for forty minutes.": (0.066844, 0.101152, 0.072248, -0.004035),
    "How do I compute an eigenvalue?\nUse the characteristic polynomial.": (0.047015, 0.117964, -0.023722, -0.021455),
    "word " * 600: (-0.008124, -0.095586, -0.038673, 0.049662),  # cut at 256 tokens
    "ünïcödé 漢字 🙂": (-0.041688, 0.011347, -0.036234, 0.044391),
}
COOKING = ("Bake the bread for {} minutes.", "Knead the dough for {} minutes, then let it rise.")
SPACE = ("The rocket reached orbit after {} minutes.", "The probe orbits Saturn's moon every {} minutes.")
ROWS: list[Any] = [
    {"instruction": f"Say something about {topic}, number {i}.", "input": "", "output": text.format(i + 10)}
    for i in range(6)
    for topic, texts in (("cooking", COOKING), ("space flight", SPACE))
    for text in texts
]


@pytest.fixture(scope="module")
def minilm() -> ModelFiles:
    """The embedded embedder, fetched if it is not in the cache."""
    return find_model("all-minilm-l6-v2")


@pytest.fixture
def scored(tiny: Callable[[str], ModelFiles], write_jsonl: Write, tmp_path: Path) -> Run:
    """A run of ROWS, an exact copy of the fifth, one off its instruction, and one without text."""
    answer = "The committee postponed its vote on fishing quotas."
    odd = {"instruction": "Translate 'good morning' into French.", "input": "", "output": answer}
    data = write_jsonl([*ROWS, ROWS[4], odd, 17])
    return score(data, tmp_path / "run", model=str(tiny("gpt2").path), device="cpu", protocol="small2large")


def parts(run: Run, kind: str = "part") -> np.ndarray[Any, Any]:
    return np.concatenate([np.load(path) for path in sorted((run.path / "embeddings").glob(f"{kind}-*.npy"))])


def test_embeddings_are_those_of_sentence_transformers(minilm: ModelFiles) -> None:
    embedder = Embedder(minilm, EmbedderConfig())
    found = embedder.embed(list(KNOWN))
    assert found.dtype == np.float32
    assert found.shape == (5, 384)
    np.testing.assert_allclose(found[:, :4], list(KNOWN.values()), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    for i, text in enumerate(KNOWN):  # what else is in the batch does not matter
        np.testing.assert_allclose(embedder.embed([text])[0], found[i], atol=1e-6)
    assert not embedder.embed(["", "a", ""])[[0, 2]].any()


def test_clusters_by_topic_and_flags(scored: Run) -> None:
    table = cluster(scored, clusters=2, flags=True, device="cpu")
    assert table.schema == {"record_id": pl.Int64, "cluster": pl.Int64, "distance": pl.Float32}
    assert table["record_id"].to_list() == list(range(27))
    assert pl.read_parquet(scored.path / "clusters.parquet").equals(table)
    labels = table["cluster"].to_list()
    assert {(i // 2 % 2, labels[i]) for i in range(24)} in ({(0, 0), (1, 1)}, {(0, 1), (1, 0)})
    assert labels[24] == labels[4]
    assert labels[26] is None
    assert table["distance"][26] is None

    matrix = parts(scored)
    assert matrix.shape == (27, 384)
    assert not matrix[26].any()
    mine = [i for i in range(26) if labels[i] == labels[0]]
    centre = matrix[mine].mean(axis=0)
    assert table["distance"][0] == pytest.approx(float(np.linalg.norm(matrix[0] - centre)), abs=1e-3)

    flags = pl.read_parquet(scored.path / "flags.parquet")
    assert flags.schema == {"record_id": pl.Int64, "far_from_instruction": pl.Boolean, "near_duplicate": pl.Boolean}
    assert flags["near_duplicate"][24] is True
    assert flags["near_duplicate"][4] is False  # the copy is flagged, not what it copies
    assert flags["far_from_instruction"].to_list()[25:] == [True, None]
    assert not flags["far_from_instruction"][:25].any()


def test_rows_over_fifty_unless_told(scored: Run, tmp_path: Path) -> None:
    assert cluster(scored, device="cpu")["cluster"].n_unique() == 2  # one cluster, and null
    assert cluster(scored, min_mean_size=6, device="cpu")["cluster"].drop_nulls().n_unique() == 4  # 26 / 6
    with pytest.raises(ScorerError, match="26 records with text can't make 27 clusters"):
        cluster(scored, clusters=27, device="cpu")
    with pytest.raises(ScorerError, match="min_mean_size: 0 is not a whole number of at least 1"):
        cluster(scored, min_mean_size=0)
    with pytest.raises(ScorerError, match="not a run directory"):
        cluster(tmp_path / "nowhere")


def test_whole_parts_are_kept_and_the_rest_made(scored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "PART_ROWS", 5)
    command = Commands(scored.path.parent)
    table = cluster(scored, clusters=3, device="cpu")
    whole = parts(scored)
    folder = scored.path / "embeddings"
    names = [f"part-{i:05d}.npy" for i in range(6)]
    assert sorted(path.name for path in folder.glob("*.npy")) == names
    first = (folder / names[0]).stat().st_mtime_ns
    for name in names[2:]:
        (folder / name).unlink()
    (folder / f".{names[2]}.123.tmp").write_bytes(b"half")  # of a killed process
    assert cluster(scored, clusters=3, device="cpu").equals(table)  # seeded, and the same parts
    assert (parts(scored) == whole).all()
    assert (folder / names[0]).stat().st_mtime_ns == first
    assert not list(folder.glob(".*"))
    with pytest.raises(ScorerError, match=r"other embeddings \(max_tokens changed\): use --fresh"):
        cluster(scored, clusters=3, max_tokens=8, device="cpu")
    kept = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(kept | {"format": 1}))  # of a version with its own pooling
    with pytest.raises(ScorerError, match=r"other embeddings \(format changed\): use --fresh"):
        cluster(scored, clusters=3, device="cpu")
    (folder / "manifest.json").write_text(json.dumps(kept))
    monkeypatch.undo()
    assert "other embeddings (part_rows changed)" in command("cluster", scored.path, "--clusters", 3).line()
    command("cluster", scored.path, "--clusters", 3, "--fresh").done()
    assert len(list(folder.glob("*.npy"))) == 1
    assert not (scored.path / "flags.parquet").exists()


def test_changed_data_is_refused(scored: Run) -> None:
    path = Path(scored.manifest.paths[0])
    path.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ScorerError, match="changed since it was scored"):
        cluster(scored, device="cpu")


def test_options_of_the_embedder_reach_it(scored: Run, minilm: ModelFiles, tmp_path: Path) -> None:
    command = Commands(scored.path.parent)
    folder = Path(shutil.copytree(minilm.path, tmp_path / "embedder"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    arguments = ("cluster", scored.path, "--clusters", 2, "--embedder", folder)
    assert "its weights are pickled" in command(*arguments).line()
    said = command(*arguments, "--allow-pickle").done()
    assert not set(said.split("\n")[0]) & set("%│█")  # no bar of another program's
    expected = parts(scored)
    kept = json.loads((scored.path / "embeddings" / "manifest.json").read_text())
    assert kept["prompt"] is None
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "own.Normalize"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "own.py").write_text("from sentence_transformers.sentence_transformer.modules import Normalize\n")
    ended = command(*arguments, "--allow-pickle", "--fresh")
    assert (ended.code, "give --trust-remote-code" in ended.err) == (2, True)
    options = (*arguments, "--allow-pickle", "--fresh", "--trust-remote-code")
    end(start(tmp_path, *options, HF_MODULES_CACHE=str(tmp_path / "modules"))).done()
    np.testing.assert_allclose(parts(scored), expected, atol=1e-6)


def test_kmeans_ends_where_each_row_is_nearest_its_own_mean() -> None:
    draw = np.random.default_rng(1)
    rows = draw.standard_normal((600, 8)).astype(np.float32)
    filled = np.arange(600) % 7 > 0
    labels, distances = kmeans([rows[:200], rows[200:450], rows[450:]], filled, 5, iterations=200, seed=3)
    used = rows[filled]
    centres = np.stack([used[labels == k].mean(axis=0) for k in range(5)])
    gaps = np.linalg.norm(used[:, None] - centres[None], axis=2)
    assert (gaps.argmin(axis=1) == labels).all()
    np.testing.assert_allclose(distances, gaps.min(axis=1), atol=1e-3)
    assert (kmeans([rows], filled, 5, iterations=200, seed=3)[0] == labels).all()  # however it is parted
    assert (kmeans([rows], filled, 5, iterations=200, seed=4)[0] != labels).any()


def test_near_duplicates_are_exact_across_blocks() -> None:
    draw = np.random.default_rng(2)
    rows = draw.standard_normal((BLOCK_ROWS + 500, 16)).astype(np.float32)
    rows[BLOCK_ROWS + 7] = rows[3] + 0.01 * rows[5]  # in another block
    rows[40] = 2 * rows[39]  # in the same
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = near_duplicates([rows[:1000], rows[1000:]], 0.98)
    assert np.flatnonzero(found).tolist() == [40, BLOCK_ROWS + 7]
    assert (found == (np.tril(rows @ rows.T, -1).max(axis=1) > 0.98)).all()
