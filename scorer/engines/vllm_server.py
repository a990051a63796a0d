"""What vLLM's HTTP server loads: routes that score token sequences, for `--engine http://HOST:PORT`.

A plugin of the group `vllm.endpoint_plugins`, which vLLM loads where VLLM_PLUGINS names it. The routes lie under /v1,
which the server's API key guards. Knows vLLM's server; nothing of records, files or formulas.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from argparse import Namespace
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field, StrictInt
from vllm.utils import random_uuid

from scorer.engines.vllm_plugin import PREFIX
from scorer.engines.vllm_plugin import request as scoring_request

REVISION = "SCORER_MODEL_REVISION"  # of the environment: what `scorer serve` says of the model that it serves
SHAPE = ("model_type", "vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "intermediate_size")

router = APIRouter(prefix="/v1/scorer")


class Sequence(BaseModel):
    """Token ids, and the spans of them to score: [start, end) each, ascending and apart, start >= 1."""

    token_ids: Annotated[list[StrictInt], Field(min_length=2)]
    spans: Annotated[list[tuple[StrictInt, StrictInt]], Field(min_length=1)]


class ScoreRequest(BaseModel):
    """What is posted to /v1/scorer/score."""

    sequences: list[Sequence]


@router.get("/model")
async def model(request: Request) -> dict[str, Any]:
    """Which model is served, and how."""
    return dict(request.app.state.scorer_model)


@router.post("/score")
async def score(body: ScoreRequest, request: Request) -> dict[str, Any]:
    """`rows`: for each sequence its spans' [NLL sum in nats, tokens]; null is an infinite or undefined sum."""
    served = request.app.state.scorer_model
    for sequence in body.sequences:
        if fault := _fault(sequence, served):
            raise HTTPException(422, fault)
    rows = await asyncio.gather(*(_score(request.app.state.scorer_engine, s) for s in body.sequences))
    return {"identity": served["identity"], "rows": rows}


async def _score(engine: Any, sequence: Sequence) -> list[list[float | None]]:
    prompt, params = scoring_request(sequence.token_ids, sequence.spans)
    async for output in engine.encode(prompt, params, f"scorer-{random_uuid()}"):
        rows = output.outputs.data[: len(sequence.spans)].tolist()
    return [[nll if math.isfinite(nll) else None, tokens] for nll, tokens in rows]


def _fault(sequence: Sequence, served: dict[str, Any]) -> str | None:
    """What would end the engine, and with it every other client's requests."""
    ids, bounds = sequence.token_ids, [bound for span in sequence.spans for bound in span]
    if len(ids) > served["max_model_len"]:
        return f"{len(ids)} tokens are more than the {served['max_model_len']} that are served"
    if min(ids) < 0 or max(ids) >= served["vocab_size"]:
        return f"a token id is not below the vocabulary's {served['vocab_size']}"
    if bounds[0] < 1 or bounds[-1] > len(ids) or bounds != sorted(bounds):
        return "spans are not ascending and apart within tokens 1 to the last"
    return None


class ScoringEndpoint:
    """The plugin, as vLLM's `EndpointPlugin` has it."""

    name = "scorer"
    required_tasks = ("plugin",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keep the engine, and say which model it has."""
        config = engine_client.model_config
        settings = config.hf_config.to_dict()
        served = {
            "revision": os.environ.get(REVISION),
            "architecture": config.architectures[0].removeprefix(PREFIX),
            "shape": {name: settings[name] for name in SHAPE if name in settings},
            "dtype": str(config.dtype).removeprefix("torch."),
            "quantization": config.quantization,
            "vocab_size": config.get_vocab_size(),
            "max_model_len": config.max_model_len,
            "versions": {name: version(name) for name in ("torch", "transformers", "ifd-scorer")},
        }
        digest = hashlib.sha256(json.dumps(served, sort_keys=True).encode()).hexdigest()
        state.scorer_model = served | {"model": config.model, "identity": digest}
        state.scorer_engine = engine_client
