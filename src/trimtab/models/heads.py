"""Attention heads, as transformers configs tell them."""

from __future__ import annotations

from typing import Any, NamedTuple

from trimtab.models.fused import Fused


class Heads(NamedTuple):
    """Numbers of query and of key heads, and the width of a head."""

    queries: int
    keys: int
    width: int

    def fused(self, *, grouped: bool) -> Fused:
        """How the rows of one projection to all of them lie: so for each key head, or stacked."""
        if grouped:
            return Fused(self.keys, self.queries // self.keys * self.width, self.width)
        return Fused(1, self.queries * self.width, self.keys * self.width)


def heads_of(config: Any) -> Heads | None:
    """The heads that a config tells, or None where it tells none."""
    queries = getattr(config, "num_attention_heads", None)
    if queries is None:
        return None
    width = (
        getattr(config, "head_dim", None)
        or getattr(config, "d_kv", None)
        or config.hidden_size // queries
    )
    return Heads(int(queries), int(_key_heads(config) or queries), int(width))


def _key_heads(config: Any) -> int | None:
    """The number of key heads, where it may differ from that of query heads."""
    if config.model_type == "falcon" and config.new_decoder_architecture:
        return config.num_kv_heads
    if config.model_type == "falcon":
        return 1 if config.multi_query else None
    if config.model_type == "gpt_bigcode":
        return 1 if config.multi_query else None
    return getattr(config, "num_key_value_heads", None)
