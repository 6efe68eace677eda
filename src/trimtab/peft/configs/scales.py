"""Configurations of methods that rescale activations or train a model's own few values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from trimtab.adapt.contract import Init, Method, normal
from trimtab.adapt.parse import methods
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import ConfigError, TargetError
from trimtab.peft.config import config, option
from trimtab.peft.configs.common import Excluding, Named, Transposed
from trimtab.peft.defaults import IA3, default_feedforward, model_type, warn_own
from trimtab.peft.targets import matching, says
from trimtab.peft.types import PeftType


@config(PeftType.IA3)
class IA3Config(Excluding, Transposed):
    """(IA)³: rescale keys, values and the inner activations of the feed-forward."""

    prefix: ClassVar[str] = "ia3_"

    feedforward_modules: list[str] | str | None = option(
        "Of the targets, those whose input is rescaled, not their output.", default=None
    )
    init_ia3_weights: bool = option("Begin at the identity; False begins at random.", default=True)

    def check(self) -> None:
        super().check()
        inner, outer = self.feedforward_modules, self.target_modules
        says(inner, "feedforward_modules", "IA3Config")
        both = not isinstance(inner, str) and not isinstance(outer, str)
        lacking = sorted(set(inner or ()) - set(outer)) if both and outer else []
        if lacking:
            raise ConfigError(
                f"IA3Config: feedforward_modules are a part of target_modules, which lack {lacking}."
            )

    def read(self, options: dict[str, Any], model: nn.Module) -> Method:
        if not options["target_modules"] and model_type(model) not in IA3:
            return self._in_roles(options, model)
        known = options["feedforward_modules"] is not None
        if not known:
            options["feedforward_modules"] = default_feedforward(model)
        found = super().read(options, model)
        if not options["feedforward_modules"]:
            return found
        anatomy = anatomy_of(model)
        chosen = anatomy.select(found.targets, found.exclude)
        selectors = dict(found)["feedforward"]
        inner = [path for path in matching(anatomy, selectors) if path in chosen]
        if known and not inner:
            raise TargetError(
                f"IA3Config: none of the {len(chosen)} targets is in feedforward_modules={self.feedforward_modules!r}."
            )
        return found.replace(feedforward=tuple(inner))

    def _in_roles(self, options: dict[str, Any], model: nn.Module) -> Method:
        """Where PEFT has no default: as in the paper, by the roles that the model's layers have."""
        if options["exclude_modules"] or options["feedforward_modules"]:
            raise ConfigError("IA3Config: give target_modules, of which these options are parts.")
        warn_own(model, "keys, values and the last layer of each feed-forward")
        return methods.get("ia3")()

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_ia3_weights else {"ia3_l": normal(1.0)}


@config(PeftType.LN_TUNING)
class LNTuningConfig(Excluding):
    """Norm tuning: train the weights and biases of the norms."""

    prefix: ClassVar[str] = "ln_tuning_"


@config(PeftType.TRAINABLE_TOKENS)
class TrainableTokensConfig(Named):
    """Train the embeddings of chosen tokens."""

    prefix: ClassVar[str] = "trainable_tokens_"

    token_indices: list[int] = option("The tokens.", default=[])
    init_weights: bool = option("Begin as the model's rows; False begins at random.", default=True)

    def check(self) -> None:
        super().check()
        if not all(isinstance(token, int) and token >= 0 for token in self.token_indices):
            raise ConfigError(
                f"TrainableTokensConfig: token_indices are numbers of tokens, not {self.token_indices!r}."
            )

    def read(self, options: dict[str, Any], model: nn.Module) -> Method:
        if not self.token_indices:
            raise ConfigError("TrainableTokensConfig: token_indices names no token.")
        options["target_modules"] = options["target_modules"] or ["input_embedding"]
        return super().read(options, model).replace(tie=True)

    def first_values(self) -> Mapping[str, Init]:
        return {} if self.init_weights else {"trainable_tokens_delta": normal(1.0)}
