"""Routes of vLLM's HTTP server that score token sequences, for `--engine http://HOST:PORT`.

A plugin of the group `vllm.endpoint_plugins`, which vLLM loads where VLLM_PLUGINS names it. The routes are under /v1,
which the server's API key protects.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import math
import os
import shutil
import socket
import time
from argparse import Namespace
from contextlib import suppress
from importlib.metadata import version
from threading import Thread
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field, StrictInt
from vllm.utils import random_uuid

from scorer.engines.vllm_plugin import PREFIX, scoring_request

# Environment variables of `scorer serve`: the revision of its model, and the folder of vLLM's sockets.
REVISION, FOLDER = "SCORER_MODEL_REVISION", "SCORER_VLLM_FOLDER"
SHAPE_KEYS = ("model_type", "vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "intermediate_size")

router = APIRouter(prefix="/v1/scorer")


class Sequence(BaseModel):
    """Token ids, and the spans [start, end) of them to score: ascending and disjoint, start >= 1."""

    token_ids: Annotated[list[StrictInt], Field(min_length=2)]
    spans: Annotated[list[tuple[StrictInt, StrictInt]], Field(min_length=1)]


class ScoreRequest(BaseModel):
    """The body of POST /v1/scorer/score."""

    sequences: list[Sequence]


@router.get("/model")
async def model(request: Request) -> dict[str, Any]:
    """The served model, its dtype and limits."""
    return dict(request.app.state.scorer_model)


@router.post("/score")
async def score(body: ScoreRequest, request: Request) -> dict[str, Any]:
    """`rows`: for each sequence, [NLL sum in nats, tokens] of each span; an infinite or undefined sum is null.

    `request` is the SHA-256 of the body that they are the answer to.
    """
    served = request.app.state.scorer_model
    for sequence in body.sequences:
        if error := _check(sequence, served):
            raise HTTPException(422, error)
    rows = await asyncio.gather(*(_score(request.app.state.scorer_engine, s) for s in body.sequences))
    digest = hashlib.sha256(await request.body()).hexdigest()
    return {"identity": served["identity"], "request": digest, "rows": rows}


async def _score(engine: Any, sequence: Sequence) -> list[tuple[float | None, int]]:
    prompt, params = scoring_request(sequence.token_ids, sequence.spans)
    async for output in engine.encode(prompt, params, f"scorer-{random_uuid()}"):
        rows = output.outputs.data[: len(sequence.spans)].tolist()
    return [(nll if math.isfinite(nll) else None, int(tokens)) for nll, tokens in rows]


def _check(sequence: Sequence, served: dict[str, Any]) -> str | None:
    """The error of a sequence that would end the engine, and with it the requests of every other client."""
    ids, bounds = sequence.token_ids, [bound for span in sequence.spans for bound in span]
    if len(ids) > served["max_model_len"]:
        return f"a sequence has {len(ids)} tokens, more than the {served['max_model_len']} that the server takes"
    if min(ids) < 0 or max(ids) >= served["vocab_size"]:
        return f"a token id is outside the vocabulary of {served['vocab_size']} tokens"
    if bounds[0] < 1 or bounds[-1] > len(ids) or bounds != sorted(bounds):
        return f"spans are not ascending and disjoint within tokens 1 to {len(ids)}"
    return None


def _tell_when_ready(host: str, port: int) -> None:
    """Say on standard error that the server answers; vLLM calls no plugin at that time."""
    while True:
        with suppress(OSError), socket.create_connection((host, port), 1):
            shown = f"[{host}]" if ":" in host else host
            # not sys.stderr, to which vLLM adds the name of its process
            os.write(2, f"scorer: ready at http://{shown}:{port}\n".encode())
            return
        time.sleep(0.2)


class ScoringEndpoint:
    """The plugin; implements vLLM's `EndpointPlugin`."""

    name = "scorer"
    required_tasks = ("plugin",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keep the engine, and the description of its model; remove the folder of vLLM's sockets at exit."""
        if FOLDER in os.environ:
            atexit.register(shutil.rmtree, os.environ[FOLDER])
        config = engine_client.model_config
        settings = config.hf_config.to_dict()
        served = {
            "revision": os.environ.get(REVISION),
            "architecture": config.architectures[0].removeprefix(PREFIX),
            "shape": {name: settings[name] for name in SHAPE_KEYS if name in settings},
            "dtype": str(config.dtype).removeprefix("torch."),
            "quantization": config.quantization,
            "vocab_size": config.get_vocab_size(),
            "max_model_len": config.max_model_len,
            "versions": {name: version(name) for name in ("torch", "transformers", "ifd-scorer")},
        }
        digest = hashlib.sha256(json.dumps(served, sort_keys=True).encode()).hexdigest()
        Thread(target=_tell_when_ready, args=(args.host, args.port), daemon=True, name="scorer-ready").start()
        state.scorer_model = served | {"model": config.model, "identity": digest}
        state.scorer_engine = engine_client
