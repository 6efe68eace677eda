"""What the configurations of layer-wise methods share: where they act."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from trimtab.adapt.contract import Method
from trimtab.adapt.peft_config import selectors
from trimtab.errors import ConfigError, suggest
from trimtab.peft.config import PeftConfig, config, option
from trimtab.peft.defaults import Names, default_targets
from trimtab.peft.targets import Where, aimed, says

WHERE = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip
"""Options that are resolved on the model, not read by the method."""


@config()
class Named(PeftConfig):
    """Acts on modules that are named."""

    target_modules: list[str] | str | None = option(
        "Modules by the end of their names, a regular expression, or 'all-linear'; none is the model's default.",
        default=None,
    )
    own_default: ClassVar[bool] = False
    """Whether the method itself knows where to act."""

    def check(self) -> None:
        super().check()
        kind = type(self).__name__
        says(self.target_modules, "target_modules", kind)
        full = self.__dict__.get("modules_to_save")
        if isinstance(full, str):
            raise ConfigError(f"{kind}: modules_to_save is a list of names; write [{full!r}].")
        says(full, "modules_to_save", kind)

    def read(self, options: dict[str, Any], model: nn.Module) -> Method:
        left = {name: value for name, value in options.items() if name not in WHERE}
        found = super().read(left, model)
        if not (options.get("target_modules") or options.get("target_parameters")):
            if not self.own_default:
                return aimed(found, self._default(options, model), model)
            return self._narrowed(found, options, model)
        return aimed(found, self._where(options, options["target_modules"]), model)

    def _narrowed(self, method: Method, options: dict[str, Any], model: nn.Module) -> Method:
        """A method that knows where to act, without what is excluded, in these layers alone."""
        layers, exclude = options.get("layers_to_transform"), options.get("exclude_modules")
        if layers is None and not exclude:
            return method
        if method.targets:
            return aimed(method, self._where(options, listed(method.targets)), model)
        numbers = (layers,) if isinstance(layers, int) else layers
        return method.replace(exclude=selectors(exclude), layers=numbers)

    def _default(self, options: dict[str, Any], model: nn.Module) -> Where:
        return self._where(options, default_targets(self.peft_type, model), lenient=True)

    def _where(
        self, options: dict[str, Any], targets: Names | None, lenient: bool = False
    ) -> Where:
        return Where(
            targets,
            options.get("exclude_modules"),
            options.get("layers_to_transform"),
            options.get("layers_pattern"),
            options.get("target_parameters") or (),
            self.__dict__.get("modules_to_save") or (),
            self.task_type,
            lenient,
        )


@config()
class Targeted(Named):
    """Others may be trained in full beside it."""

    modules_to_save: list[str] | None = option(
        "Modules that are trained in full beside it, such as a new head.", default=None
    )


@config()
class Excluding(Targeted):
    """Some of the targets can be left out."""

    exclude_modules: list[str] | str | None = option(
        "Of the targets, those that are left out: names, or a regular expression.", default=None
    )

    def check(self) -> None:
        super().check()
        says(self.exclude_modules, "exclude_modules", type(self).__name__)


@config()
class Layered(Targeted):
    """Targets of some layers only."""

    layers_to_transform: list[int] | int | None = option(
        "Only the targets in layers of these numbers.", default=None
    )
    layers_pattern: list[str] | str | None = option(
        "The name before the number of a layer, such as 'layers' or 'h'.", default=None
    )

    def check(self) -> None:
        super().check()
        kind, layers = type(self).__name__, self.layers_to_transform
        several = isinstance(layers, list | tuple | set | range)
        if layers is not None and not isinstance(layers, int) and not several:
            raise ConfigError(
                f"{kind}: layers_to_transform is a number or a list of numbers, not {layers!r}."
            )
        if self.layers_pattern and layers is None:
            raise ConfigError(
                f"{kind}: layers_pattern says which numbers layers_to_transform means; give both."
            )


@config()
class Transposed(Targeted):
    """Layers may hold their weight transposed."""

    fan_in_fan_out: bool = option(
        "Whether weights lie transposed. Trimtab sees that by itself.", default=False
    )


@config()
class Biased(Targeted):
    """Biases may be trained beside it."""

    bias: str = option(
        "Biases that are trained too: 'none', 'all', or the method's name with '_only' (those of the targets).",
        default="none",
    )

    def check(self) -> None:
        super().check()
        if self.bias not in ("none", "all") and not str(self.bias).endswith("_only"):
            kind, hint = type(self).__name__, suggest(str(self.bias), ("none", "all"))
            raise ConfigError(
                f"{kind}: bias must be none, all, or the method's name with _only, not {self.bias!r}.{hint}"
            )


def listed(selectors: Any) -> list[Any]:
    """A method's selectors as a list, in which a regular expression keeps its ``re:``."""
    return [selectors] if isinstance(selectors, str) else list(selectors or ())
