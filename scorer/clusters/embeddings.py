"""Sentence embeddings of a run's records, on disk part by part.

    RUN/embeddings/manifest.json          the data and the model that they were made from, and the SHA-256 of each part
    RUN/embeddings/part-00000.npy         float32 [records of the part, D], unit length, in record order; and so on
    RUN/embeddings/instruction-00000.npy  the same for the instruction and input alone
    RUN/embeddings/response-00000.npy     the same for the response alone

A part is whole or absent, and is memory-mapped, so that the embeddings are never in memory twice. A record without text
has a row of zeros. scorer.clusters.embedder embeds the texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from scorer.clusters.embedder import Embedder, Matrix
from scorer.config import EmbedderConfig
from scorer.data.dataset import Dataset
from scorer.models.find import ModelFiles, find_model
from scorer.runs.directory import EMBEDDINGS, MANIFEST, Run
from scorer.runs.extras import DIGESTS, is_whole, read_embeddings_manifest
from scorer.runs.manifest import Manifest, differences
from scorer.runs.progress import Progress
from scorer.storage.atomic import remove_temporaries, replacing
from scorer.types import Record, ScorerError

FORMAT = 2  # 1: at most the positions that the model has, rather than its max_seq_length, and no prompt
PART_ROWS = 2000


def _text(record: Record, *, prompt: bool, response: bool) -> str:
    texts: list[str] = []
    for turn in record.turns:
        texts += [*(message.content for message in turn.prompt), turn.input] if prompt else []
        texts += [turn.response] if response else []
    return "\n".join(text for text in texts if text.strip())


TEXTS: Mapping[str, Callable[[Record], str]] = {
    "part": partial(_text, prompt=True, response=True),
    "instruction": partial(_text, prompt=True, response=False),
    "response": partial(_text, prompt=False, response=True),
}


def embed(run: Run, data: Dataset, kind: str, config: EmbedderConfig, progress: Progress) -> list[Matrix]:
    """The embeddings of a run's records, in memory-mapped parts; makes the parts that are missing.

    kind: a key of TEXTS; "part" embeds instruction, input and response as one text. The caller holds `run.locked()`.

    Raises ScorerError where the folder holds embeddings by another model or of other data, and for a model that
    `find_model` refuses as an embedder, or that does not load.
    """
    files = find_model(config.embedder, embedder=True, allow_pickle=config.allow_pickle, report=progress.say)
    manifest = run.manifest
    folder = run.path / EMBEDDINGS
    identity = _identity(manifest, files, config)
    before = read_embeddings_manifest(folder)
    if changes := differences(before or identity, identity):
        raise ScorerError(f"{folder} holds other embeddings ({'; '.join(changes)}): use --fresh to discard them")
    known: dict[str, str] = before.get(DIGESTS, {})
    parts = [folder / f"{kind}-{i:05d}.npy" for i in range(-(-manifest.records // PART_ROWS))]
    remove_temporaries(folder / f"{kind}-*.npy")
    done = next((i for i, part in enumerate(parts) if not is_whole(part, known)), len(parts))
    if done < len(parts):
        what = "records" if kind == "part" else f"{kind}s"
        progress.say(f"embedding the {what} with {files.name}")
        progress.begin(manifest.records, done * PART_ROWS)
        model = Embedder(files, config)
        content = identity | model.settings
        records = data.records(done * PART_ROWS)
        for part in parts[done:]:
            chunk, tokens = list(islice(records, PART_ROWS)), model.tokens
            matrix = model.embed([TEXTS[kind](record) for record in chunk])
            with replacing(part) as temporary, temporary.open("w+b") as file:
                np.save(file, matrix)
                file.seek(0)
                known[part.name] = hashlib.file_digest(file, "sha256").hexdigest()
            with replacing(folder / MANIFEST) as temporary:
                temporary.write_text(json.dumps(content | {DIGESTS: known}, indent=2) + "\n", encoding="utf-8")
            progress.advance(len(chunk), model.tokens - tokens)
    return [np.load(part, mmap_mode="r") for part in parts]


def _identity(manifest: Manifest, files: ModelFiles, config: EmbedderConfig) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "embedder": files.name,
        "revision": files.revision,
        "max_tokens": config.max_tokens,
        "part_rows": PART_ROWS,
        "inputs": manifest.identity["inputs"],
        "limit": manifest.config["limit"],
        "columns": manifest.config["columns"],
    }
