"""Sentence embeddings of a run's records, on disk part by part.

    RUN/embeddings/manifest.json          what they were made of, and with
    RUN/embeddings/part-00000.npy         float32 [records of the part, D], unit length, in record order; and so on
    RUN/embeddings/instruction-00000.npy  the same of the instruction and input alone; response-00000.npy too

A part is whole or absent, and is mapped, not read, so that the embeddings are never in memory twice. A record without
text has a row of zeros. Knows sentence-transformers' layout of models; nothing of what the embeddings are for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scorer.atomic import remove_temporaries, replacing
from scorer.loading import loading
from scorer.models import ModelFiles, find_model, load_tokenizer
from scorer.progress import Progress
from scorer.records import read_records
from scorer.rundir import EMBEDDINGS, Run
from scorer.types import Record, ScorerError

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]
EMBEDDER = "all-minilm-l6-v2"
MAX_TOKENS = 256
FORMAT = 1
PART_ROWS = 2000
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}  # padded
POOLING = Path("1_Pooling", "config.json")


def _part(record: Record) -> str:
    texts = [t for turn in record.turns for t in (*(m.content for m in turn.prompt), turn.input, turn.response)]
    return "\n".join(text for text in texts if text.strip())


def _instruction(record: Record) -> str:
    texts = [t for turn in record.turns for t in (*(m.content for m in turn.prompt), turn.input)]
    return "\n".join(text for text in texts if text.strip())


def _response(record: Record) -> str:
    return "\n".join(turn.response for turn in record.turns if turn.response.strip())


TEXTS: Mapping[str, Callable[[Record], str]] = {"part": _part, "instruction": _instruction, "response": _response}


def embed(
    run: Run,
    kind: str = "part",
    *,
    embedder: str = EMBEDDER,
    max_tokens: int = MAX_TOKENS,
    device: str,
    progress: Progress,
) -> list[Matrix]:
    """The embeddings of a run's records, in parts (memory-mapped), those that are missing made first.

    kind: of TEXTS: part, the instruction, input and response; or the first two, or the last. Of a text the first
    `max_tokens` tokens count. The caller holds `run.locked()`. Raises ScorerError where the embeddings there are of
    another model or of other data, and where the model is no sentence-transformers model of a kind known here.
    """
    files = find_model(embedder, report=progress.say)
    manifest = run.manifest
    config = manifest["identity"]["config"]
    folder = run.path / EMBEDDINGS
    _same_or_new(folder, manifest, files, max_tokens)
    parts = [folder / f"{kind}-{i:05d}.npy" for i in range(-(-manifest["records"] // PART_ROWS))]
    remove_temporaries(folder / f"{kind}-*.npy")
    done = next((i for i, part in enumerate(parts) if not part.exists()), len(parts))
    if done < len(parts):
        what = "records" if kind == "part" else f"{kind}s"
        progress.say(f"embedding the {what} with {files.name}")
        progress.begin(manifest["records"], done * PART_ROWS)
        model = Embedder(files, device, max_tokens)
        paths = [entry["path"] for entry in manifest["inputs"]]
        records = read_records(paths, columns=config["columns"], start=done * PART_ROWS, limit=config["limit"])
        for part in parts[done:]:
            chunk, tokens = list(islice(records, PART_ROWS)), model.tokens
            matrix = model.embed([TEXTS[kind](record) for record in chunk])
            with replacing(part) as temporary, temporary.open("wb") as file:
                np.save(file, matrix)
            progress.advance(len(chunk), model.tokens - tokens)
        model.close()
    return [np.load(part, mmap_mode="r") for part in parts]


class Embedder:
    """A sentence-transformers model with mean or CLS pooling, run by transformers in float32.

    On CPU each core runs batches of its own; texts are sorted by length, so that little of a batch is padding.
    """

    def __init__(self, files: ModelFiles, device: str, max_tokens: int = MAX_TOKENS):
        self.mean = _pools_by_mean(files)
        self.tokenizer = load_tokenizer(files)
        with loading(files.path):
            from transformers import AutoModel

            model: Any = AutoModel.from_pretrained(files.path, dtype=torch.float32, local_files_only=True)
        self.model = model.to(device).eval().requires_grad_(False)
        self.max_tokens = min(max_tokens, getattr(model.config, "max_position_embeddings", max_tokens))
        self.tokens = 0  # embedded so far
        self.width = int(model.config.hidden_size)
        self.threads = torch.get_num_threads()
        self.workers = ThreadPoolExecutor(self.threads if device == "cpu" else 1, thread_name_prefix="scorer-embed")

    def embed(self, texts: Sequence[str]) -> Matrix:
        """float32 [len(texts), D], each row of unit length; of an empty text, zeros."""
        matrix = np.zeros((len(texts), self.width), dtype=np.float32)
        places = [i for i, text in enumerate(texts) if text]
        if not places:
            return matrix
        settings = {"truncation": True, "max_length": self.max_tokens, "verbose": False}
        ids: list[list[int]] = self.tokenizer([texts[i] for i in places], **settings)["input_ids"]
        self.tokens += sum(map(len, ids))
        batches = list(_batches(ids, BATCH_TOKENS[self.model.device.type]))
        if self.model.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            for batch, rows in zip(batches, self.workers.map(self._forward, _pick(ids, batches)), strict=True):
                matrix[[places[i] for i in batch]] = rows
        finally:
            torch.set_num_threads(self.threads)
        return matrix

    @torch.inference_mode()
    def _forward(self, ids: Sequence[Sequence[int]]) -> Matrix:
        if self.model.device.type == "cpu":
            torch.set_num_threads(1)  # the setting is each thread's own
        shape = (len(ids), max(map(len, ids)))
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(ids):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = self.model.device
        states = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).last_hidden_state
        weights = mask.to(device)[..., None].to(states.dtype)
        pooled = (states * weights).sum(1) / weights.sum(1) if self.mean else states[:, 0]
        rows: Matrix = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
        return rows

    def close(self) -> None:
        """End the threads."""
        self.workers.shutdown()


def _batches(ids: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Places of `ids`, longest first, in batches whose padded size is within the budget (or of one text)."""
    batch: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i)):
        if batch and (len(batch) + 1) * len(ids[batch[0]]) > budget:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _pick(ids: Sequence[Sequence[int]], batches: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    return ([ids[i] for i in batch] for batch in batches)


def _pools_by_mean(files: ModelFiles) -> bool:
    """True for mean pooling, False for CLS. Raises ScorerError for any other way from tokens to a sentence."""
    path = files.path / POOLING
    if not path.exists() and files.origin == "hub":
        from huggingface_hub import errors, hf_hub_download

        try:
            path = Path(hf_hub_download(files.name, str(POOLING), revision=files.revision))
        except (OSError, errors.HfHubHTTPError) as error:
            raise ScorerError(f"embedder '{files.name}': the hub gives no {POOLING} of it ({error})") from error
    modules = files.path / "modules.json"
    if not path.exists() or not modules.exists():
        raise ScorerError(f"{files.path}: not a sentence-transformers model: it needs modules.json and {POOLING}")
    kinds = {module["type"].rpartition(".")[2] for module in json.loads(modules.read_text(encoding="utf-8"))}
    if unknown := sorted(kinds - {"Transformer", "Pooling", "Normalize"}):
        raise ScorerError(f"{files.path}: an embedder with a module {unknown[0]} is not supported; choose another")
    pooling = json.loads(path.read_text(encoding="utf-8"))
    modes = {name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True}
    if modes not in ({"pooling_mode_mean_tokens"}, {"pooling_mode_cls_token"}):
        raise ScorerError(f"{path}: only mean and CLS pooling are supported, not {', '.join(sorted(modes)) or 'none'}")
    return modes == {"pooling_mode_mean_tokens"}


def _same_or_new(folder: Path, manifest: dict[str, Any], files: ModelFiles, max_tokens: int) -> None:
    config = manifest["identity"]["config"]
    identity = {
        "format": FORMAT,
        "embedder": files.name,
        "revision": files.revision,
        "max_tokens": max_tokens,
        "part_rows": PART_ROWS,
        "inputs": manifest["identity"]["inputs"],
        "limit": config["limit"],
        "columns": config["columns"],
    }
    path = folder / "manifest.json"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    if changes := [name for name, value in identity.items() if before.get(name) != value]:
        raise ScorerError(f"{folder} holds embeddings of other {', '.join(changes)}: use --fresh to discard them")
