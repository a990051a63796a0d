"""Falcon's attention in transformers' interface, which its own classes do not use."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.falcon import modeling_falcon

from scorer.engines.attention import ATTENTION, varlen_attention


class PackedFalconAttention(modeling_falcon.FalconAttention):  # type: ignore[misc]
    """FalconAttention, by `varlen_attention` where the configuration names it."""

    def forward(self, hidden_states: torch.Tensor, alibi: torch.Tensor | None, *args: Any, **options: Any) -> Any:
        """As FalconAttention's: [1, T, hidden size] -> the same, and no attention weights."""
        if self.config._attn_implementation != ATTENTION:
            return super().forward(hidden_states, alibi, *args, **options)
        assert alibi is None, "why_not_packed refuses it"
        query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
        query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *options["position_embeddings"])
        mixed, _ = varlen_attention(self, query, key, value, None)
        return self.dense(mixed.flatten(2)), None


def register() -> None:
    """Let transformers build Falcon with this attention."""
    modeling_falcon.FALCON_ATTENTION_CLASSES[ATTENTION] = PackedFalconAttention
