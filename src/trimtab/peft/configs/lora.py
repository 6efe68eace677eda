"""`LoraConfig`."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar

from trimtab.adapt.contract import Method
from trimtab.errors import ConfigError
from trimtab.peft.config import PeftConfig, config
from trimtab.peft.types import PeftType

_INITS = {"gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa", "olora": "olora", "eva": "eva",
          "lora_ga": "lora-ga"}  # fmt: skip


@config(PeftType.LORA)
class LoraConfig(PeftConfig):
    """LoRA, and DoRA with ``use_dora``."""

    prefix: ClassVar[str] = "lora_"

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    trainable_token_indices: Any = None

    def begun(self, method: Method) -> Method:
        if self.init_lora_weights is True:
            return method
        if self.init_lora_weights not in _INITS:
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r}: choose {', '.join(_INITS)} or True."
            )
        return method.replace(init=_INITS[str(self.init_lora_weights)])
