"""``peft.functional``: what libraries call on a model that adapters were put into, with nothing around it."""

from trimtab.peft.adapters import (
    cast_adapter_dtype,
    delete_adapter,
    set_adapter,
    set_requires_grad,
)
from trimtab.peft.state import get_peft_model_state_dict, set_peft_model_state_dict
from trimtab.peft.task_models import inject_adapter_in_model

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
