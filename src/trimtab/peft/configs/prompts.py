"""Configurations of methods that train prompts: before the text, and inside attention."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar, Literal

from torch import nn

from trimtab.adapt.contract import Init, Method, zeros
from trimtab.adapt.parse import methods
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import ConfigError, UnsupportedError, suggest
from trimtab.peft.config import PeftConfig, config, option
from trimtab.peft.errors import PeftWarning
from trimtab.peft.types import PeftType

_DECODER = r"re:(.*\.)?decoder\..*(SelfAttention|self_attn)"


class PromptTuningInit(StrEnum):
    """How a prompt begins."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"


class PromptEncoderReparameterizationType(StrEnum):
    """What makes the prompt in training."""

    MLP = "MLP"
    LSTM = "LSTM"


@config()
class PromptLearningConfig(PeftConfig):
    """What the configurations of prompts share. Sizes of the model are read from the model itself."""

    kind: ClassVar[str] = ""
    """The method of the same kind."""

    num_virtual_tokens: int | None = option("How many virtual tokens.", default=None)
    token_dim: int | None = option("Width of the embeddings, as the model has it.", default=None)
    num_transformer_submodules: int | None = option(
        "2 where an encoder-decoder's decoder is meant, as the model has it.", default=None
    )
    num_attention_heads: int | None = option("Heads, as the model has them.", default=None)
    num_layers: int | None = option("Layers, as the model has them.", default=None)
    modules_to_save: list[str] | None = option(
        "Modules that are trained in full beside it, such as a new head.", default=None
    )

    def check(self) -> None:
        super().check()
        count = self.num_virtual_tokens
        if count is not None and (
            isinstance(count, bool) or not isinstance(count, int) or count < 1
        ):
            raise ConfigError(
                f"{type(self).__name__}: num_virtual_tokens must be a whole number from 1 on, not {count!r}."
            )

    def read(self, options: dict[str, Any], model: nn.Module) -> Method:
        if self.num_virtual_tokens is None:
            raise ConfigError(f"{type(self).__name__}: num_virtual_tokens is needed.")
        self._compare(model)
        return methods.get(self.kind).parse({"length": self.num_virtual_tokens})

    def _compare(self, model: nn.Module) -> None:
        """Refuse sizes that are given and are not the model's."""
        get = getattr(getattr(model, "config", None), "get_text_config", None)
        own = None if get is None else get()
        known = {
            "token_dim": getattr(own, "hidden_size", None),
            "num_attention_heads": getattr(own, "num_attention_heads", None),
            "num_layers": getattr(own, "num_hidden_layers", None),
        }
        for name, size in known.items():
            given = getattr(self, name)
            if given is not None and size is not None and given != size:
                raise ConfigError(
                    f"{type(self).__name__}: {name}={given}, but the model has {size}; leave it out."
                )

    @classmethod
    def told(cls, method: Method, options: Mapping[str, Any]) -> PeftConfig:
        fields = dict(method)
        given = {**options, "num_virtual_tokens": fields["length"]}
        return super().told(method, given | cls.encoder(fields))

    @classmethod
    def encoder(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What a method's fields say of its encoder."""
        return {}


@config(PeftType.PROMPT_TUNING)
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: trained input embeddings before the text."""

    kind: ClassVar[str] = "prompt"
    prefix: ClassVar[str] = "prompt_tuning_"

    prompt_tuning_init: PromptTuningInit | str = option(
        "How it begins: RANDOM, TEXT, or SAMPLE_VOCAB (embeddings of drawn tokens).",
        default=PromptTuningInit.RANDOM,
    )
    prompt_tuning_init_text: str | None = option("The text it begins as.", default=None)
    tokenizer_name_or_path: str | None = option("What tokenises that text.", default=None)
    tokenizer_kwargs: dict[str, Any] | None = option("Options of that tokenizer.", default=None)

    def check(self) -> None:
        super().check()
        self.prompt_tuning_init = _member(
            PromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init"
        )
        text = self.prompt_tuning_init == PromptTuningInit.TEXT
        if text and not (self.tokenizer_name_or_path and self.prompt_tuning_init_text):
            raise ConfigError(
                "PromptTuningConfig: prompt_tuning_init='TEXT' needs prompt_tuning_init_text and "
                "tokenizer_name_or_path."
            )
        if self.tokenizer_kwargs and not text:
            raise ConfigError(
                "PromptTuningConfig: tokenizer_kwargs are for prompt_tuning_init='TEXT'."
            )

    def begun(self, method: Method, model: nn.Module) -> Method:
        if self.inference_mode:
            return method
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            return method.replace(text=self._ids())
        drawn = self.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB
        return method.replace(init="vocabulary" if drawn else "normal")

    def _ids(self) -> tuple[int, ...]:
        from transformers import AutoTokenizer

        name = str(self.tokenizer_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name, **(self.tokenizer_kwargs or {}))
        ids = tuple(tokenizer(self.prompt_tuning_init_text)["input_ids"])
        if not ids:
            raise ConfigError("PromptTuningConfig: prompt_tuning_init_text has no tokens.")
        return ids


@config(PeftType.P_TUNING)
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: a prompt whose embeddings come from a trained encoder."""

    kind: ClassVar[str] = "ptuning"
    prefix: ClassVar[str] = "p_tuning_"

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = option(
        "What makes the prompt in training: MLP or LSTM.",
        default=PromptEncoderReparameterizationType.MLP,
    )
    encoder_hidden_size: int | None = option(
        "Width of the encoder; none is that of the embeddings.", default=None
    )
    encoder_num_layers: int = option("Layers of the LSTM: only 2.", default=2)
    encoder_dropout: float = option("Of the LSTM: only 0.", default=0.0)

    def check(self) -> None:
        super().check()
        name, kinds = "encoder_reparameterization_type", PromptEncoderReparameterizationType
        self.encoder_reparameterization_type = _member(
            kinds, self.encoder_reparameterization_type, name
        )
        if (self.encoder_num_layers, self.encoder_dropout) != (2, 0.0):
            if self.encoder_reparameterization_type == kinds.LSTM:
                raise UnsupportedError(
                    "PromptEncoderConfig: Trimtab's LSTM has two layers and no dropout; leave encoder_num_layers and "
                    "encoder_dropout out."
                )
            warnings.warn(
                "PromptEncoderConfig: encoder_num_layers and encoder_dropout are of the LSTM; the MLP has three layers "
                "and no dropout.",
                category=PeftWarning,
                stacklevel=2,
            )

    def begun(self, method: Method, model: nn.Module) -> Method:
        width = self.encoder_hidden_size or anatomy_of(model).width
        kind = str(self.encoder_reparameterization_type).lower()
        return method.replace(encoder=kind, hidden=width)

    @classmethod
    def encoder(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        if "encoder" not in fields:
            return {}
        return {
            "encoder_reparameterization_type": fields["encoder"].upper(),
            "encoder_hidden_size": fields["hidden"],
        }


@config(PeftType.PREFIX_TUNING)
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning: trained keys and values before those of every attention."""

    kind: ClassVar[str] = "prefix"
    prefix: ClassVar[str] = "prefix_tuning_"

    init_weights: Literal["zero"] | None = option(
        "'zero' begins with zeros, else N(0, 1).", default=None
    )
    encoder_hidden_size: int | None = option(
        "Width of the MLP; none is that of keys.", default=None
    )
    prefix_projection: bool = option("Make the prefix by an MLP in training.", default=False)

    def check(self) -> None:
        super().check()
        if self.init_weights not in (None, "zero"):
            raise ConfigError(
                f"PrefixTuningConfig: init_weights is 'zero' or None, not {self.init_weights!r}."
            )

    def begun(self, method: Method, model: nn.Module) -> Method:
        anatomy = anatomy_of(model)
        if anatomy.encoder_decoder:  # PEFT's reaches the decoder's own attention alone
            method = method.replace(targets=_DECODER)
        if not self.prefix_projection:
            return method.replace(init_std=0.0 if self.init_weights else 1.0)
        heads, width = anatomy.key_heads
        return method.replace(hidden=self.encoder_hidden_size or heads * width)

    def first_values(self) -> Mapping[str, Init]:
        if not (self.prefix_projection and self.init_weights):
            return {}
        last = "prompt_encoder.transform.2"
        return dict.fromkeys((f"{last}.weight", f"{last}.bias"), zeros)

    @classmethod
    def encoder(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        hidden = fields.get("hidden")
        return {"prefix_projection": True, "encoder_hidden_size": hidden} if hidden else {}


@config(PeftType.ADAPTION_PROMPT)
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter: prompts beside the attention of the upper layers, behind a gate that starts shut."""

    prefix: ClassVar[str] = "adaption_prompt_"

    target_modules: str | None = option(
        "Name of the attention modules; none is the model's own.", default=None
    )
    adapter_len: int | None = option("How many prompts each attention has.", default=None)
    adapter_layers: int | None = option("In how many of the last layers.", default=None)

    def check(self) -> None:
        super().check()
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(
                    f"AdaptionPromptConfig: {name} must be a whole number from 1 on, not {value!r}."
                )

    def read(self, options: dict[str, Any], model: nn.Module) -> Method:
        if self.adapter_len is None or self.adapter_layers is None:
            raise ConfigError("AdaptionPromptConfig: adapter_len and adapter_layers are needed.")
        anatomy = anatomy_of(model)
        there = anatomy.role("self_attention")
        if self.adapter_layers > len(there):
            raise ConfigError(
                f"AdaptionPromptConfig: adapter_layers={self.adapter_layers}, but the model has {len(there)} "
                "attentions."
            )
        named = options.pop("target_modules")
        found = super().read(options, model)
        return found.replace(targets=named) if named else found


def _member(kinds: type[StrEnum], value: Any, name: str) -> Any:
    if value not in list(kinds):
        hint = suggest(str(value).upper(), list(kinds))
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(kinds)}.{hint}")
    return kinds(value)
