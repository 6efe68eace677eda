"""P-tuning (Liu et al. 2021, arXiv 2103.10385): a prompt whose embeddings come from a trained encoder.

    P = MLP(E)   or   P = W_2 relu(W_1 BiLSTM(E) + b_1) + b_2

With ``placeholder`` the prompt's tokens stand in the text, where the paper's templates put them; without, before
it. The encoder is for training; what is shared is P, a plain prompt. The MLP is PEFT's (three layers, ReLU between),
the LSTM the paper's (two layers, both directions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

from pydantic import Field
from torch import Tensor, relu

from trimtab.adapt.contract import Method, Params, Place, Spec, normal
from trimtab.adapt.encoder import TABLE, lstm, lstm_specs, mlp, mlp_specs, table
from trimtab.adapt.parse import methods
from trimtab.adapt.peft_config import refuse_unknown
from trimtab.adapt.prompted import Prompted
from trimtab.adapt.reading import input_embedding
from trimtab.models.anatomy import Anatomy

_READ = {
    "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules",
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
}  # fmt: skip
_LAYERS = 2


@final
class PTuning(Prompted):
    """``PTuning(length=20)``; ``encoder="lstm"`` is the paper's. ``hidden`` is the encoder's width: by default that
    of the embeddings, and half of it for each direction of the LSTM.
    """

    kind: ClassVar[str] = "ptuning"
    lr: ClassVar[float] = 3e-4
    peft_type: ClassVar[str | None] = "P_TUNING"

    encoder: Literal["mlp", "lstm"] = "mlp"
    """What makes the prompt in training."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of the encoder; none takes that of the embeddings."""

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        width = input_embedding(anatomy)[1].out_features
        first = table((self.length, width), normal(1.0))
        if self.encoder == "mlp":
            hidden = self.hidden or width
            return first | mlp_specs("mlp_head", (width, hidden, hidden, width))
        hidden = self.hidden or max(width // 2, 1)
        return (
            first
            | lstm_specs("lstm_head", width, hidden, _LAYERS)
            | mlp_specs("mlp_head", (2 * hidden, 2 * hidden, width))
        )

    def ready(self, shared: Params, training: bool) -> Params:
        x = shared[TABLE]
        if self.encoder == "lstm":
            x = lstm(shared, "lstm_head", x, _LAYERS)
        return {TABLE: mlp(shared, "mlp_head", x, relu)}

    def plain(self) -> Method:
        return methods.get("prompt").parse(
            {"length": self.length, "placeholder": self.placeholder, "train": self.train}
        )

    def plain_tensors(
        self, tensors: Mapping[str, Tensor], place: Place | None
    ) -> dict[str, Tensor]:
        return dict(self.ready(tensors, training=False))

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> Method | None:
        """PEFT's file holds only what the encoder made: a plain prompt."""
        refuse_unknown(config, {}, _READ, "P-tuning")
        only = {"num_virtual_tokens": config["num_virtual_tokens"]}
        return methods.get("prompt").from_peft(only, slots)
