"""What a `PeftModel` hands on to its tuner or to the user's model, by PEFT's names.

It stands here by name, and not only behind ``__getattr__``: where ``peft`` is installed, a name that our classes lack
would be found in PEFT's, and PEFT's code would run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trimtab.adapt.encoder import TABLE
from trimtab.adapt.export import exported
from trimtab.errors import UnsupportedError

if TYPE_CHECKING:
    from trimtab.peft.tuner import Tuner


class Delegates:
    """The methods; the tuner is no child here, since not every `PeftModel` has it as its ``base_model``."""

    @property
    def tuner(self) -> Tuner:
        """What the adapters are asked for."""
        found: Tuner = self.__dict__["_tuner"]
        return found

    # -- merging ---------------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Put merged weights in the place of the base's, which are kept beside them, bit for bit."""
        self.tuner.merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """The base's own weights again."""
        self.tuner.unmerge_adapter()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """The user's model with the adapters in its weights, and nothing of them beside."""
        return self.tuner.merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The user's model as it was, without adapters."""
        return self.tuner.unload()

    # -- prompts ---------------------------------------------------------------------------------------

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """What a file holds of a prompt: its virtual tokens, without what made them in training.

        Raises:
            UnsupportedError: the adapter is no prompt.
        """
        plain = exported(self.tuner.require(adapter_name))
        for name, tensor in plain.named().items():
            if name.slot == TABLE:
                return tensor.detach().cpu()
        raise UnsupportedError(f"adapter {adapter_name!r} ({plain.method.kind}) is no prompt.")

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> Tensor:
        """Refused: prompts act inside the model here, and nobody else has to put them there."""
        raise UnsupportedError(
            "get_prompt: prompts enter inside the model, for each row by its own adapter. Their values are "
            "model.get_prompt_embedding_to_save(adapter_name)."
        )

    # -- being a model ---------------------------------------------------------------------------------

    def set_modules_to_save(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what is trained in full belongs to an adapter from its beginning."""
        raise UnsupportedError(
            "set_modules_to_save: name the modules in the configuration (modules_to_save=[...]) and add an adapter."
        )

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let the embeddings' output ask for gradients, which reentrant checkpointing needs."""
        ask = getattr(model, "enable_input_require_grads", None)
        if ask is not None:
            ask()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The user's model's own."""
        return self.tuner.model.prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]
