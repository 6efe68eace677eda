"""What ``peft``'s own functions ask of a tuner's class, with a model of ours; accelerate calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trimtab.peft.config import PeftConfig


class Asked:
    """The methods; none needs an object."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: Mapping[str, Tensor],
        unwanted_adapter_names: Sequence[str],
    ) -> dict[str, Tensor]:
        from trimtab.peft.state import get_peft_model_state_dict

        return get_peft_model_state_dict(model, state_dict, adapter_name)

    @staticmethod
    def _remove_adapter_name_from_key(key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        from trimtab.peft.state import set_peft_model_state_dict

        set_peft_model_state_dict(model, state_dict, adapter_name)
        return {}  # nothing is left to load

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's configuration as a mapping; PEFT's models ask for it."""
        config = getattr(model, "config", {"model_type": "custom"})
        return dict(config.to_dict() if hasattr(config, "to_dict") else config)
