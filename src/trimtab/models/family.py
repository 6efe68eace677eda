"""What one architecture family says of its models: where the modules of each role are.

Patterns are globs over whole paths (``*`` stays within a segment, ``**`` crosses them); a family lists
what its architecture has, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """Globs by role.

    blocks: the transformer blocks.
    attention, mlp: the sub-layers; as roles they stand for the linears inside.
    queries, keys, values, fused_qkv: the projections, also those of cross-attention.
    attention_output, mlp_output: what gives a sub-layer's output before the residual is added to it, after the
        sub-layer's own dropout where that is a module.
    mlp_input: the module whose first input is the feed-forward's: the MLP, or its first layer where it is no module.
    mlp_down: the last linear of the feed-forward, whose input is the inner activations.
    mlp_norm: the norm after the feed-forward's residual, in families that norm there.
    embeddings: embedding layers; input_embedding: what gives a stack its first hidden states, or their tokens' part.
    self_attention: modules that call the attention function; cross_attention: those that attend to another stack.

    ``fused`` says how the rows of a fused projection lie: all queries before all keys before all values, or so for
    each key head. ``shifts_positions``: positions are given from outside and counted from 0, so that a prefix can
    move them. ``apart``: modules that compute something once for all rows of a batch from adapted layers, so they
    are called once per owner where a batch mixes adapters. ``uncalled``: layers whose weight is read without
    calling them, so that no edit reaches it.
    """

    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    fused_qkv: tuple[str, ...] = ()
    attention_output: tuple[str, ...] = ()
    mlp_input: tuple[str, ...] = ()
    mlp_output: tuple[str, ...] = ()
    mlp_down: tuple[str, ...] = ()
    mlp_norm: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    input_embedding: tuple[str, ...] = ()
    self_attention: tuple[str, ...] = ()
    cross_attention: tuple[str, ...] = ()
    fused: Literal["stacked", "grouped"] = "stacked"
    shifts_positions: bool = True
    apart: tuple[str, ...] = ()
    uncalled: tuple[str, ...] = ()

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        """The globs of each role that is found by paths alone."""
        return {
            "attention": self.attention,
            "mlp": self.mlp,
            "queries": self.queries,
            "keys": self.keys,
            "values": self.values,
            "fused_qkv": self.fused_qkv,
            "attention_output": self.attention_output,
            "mlp_input": self.mlp_input,
            "mlp_output": self.mlp_output,
            "mlp_down": self.mlp_down,
            "mlp_norm": self.mlp_norm,
            "embeddings": self.embeddings,
            "input_embedding": self.input_embedding,
            "self_attention": self.self_attention,
            "cross_attention": self.cross_attention,
        }
