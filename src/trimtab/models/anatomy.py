"""The anatomy of one model: its modules by role, its blocks, its entries, and how selectors match them.

Paths are canonical: those of the bare model, whether or not adapters are attached (a wrapped layer's
``base_layer`` does not show). Expert parameters stored in three dimensions are sites of their own, at
the path of the parameter.

A selector is a role (``all-linear``, ``attention``, ``mlp``, ``keys``, ``head``, …), a name that ends a path on
whole segments (``q_proj``, ``self_attn.q_proj``), a glob (``model.layers.*.mlp.*``), or ``re:`` and a regular
expression over the whole path. Each selector must match something.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import nn

from trimtab.errors import TargetError, suggest
from trimtab.frozen import Layer, view
from trimtab.frozen.experts import ExpertLayer, expert_parameters
from trimtab.models.families import FAMILIES, GENERIC, ROLES, Family


class Anatomy:
    """What selectors and methods may ask about a model.

    Args:
        root: the model.
        modules: canonical path -> module, in order (wrappers already looked through).
        aliases: further paths of modules that several parents share -> canonical path.
    """

    def __init__(
        self,
        root: nn.Module,
        modules: dict[str, nn.Module],
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.root = root
        self.modules = modules
        self.aliases = aliases
        self.config = root.__dict__.get("config")
        model_type = getattr(self.config, "model_type", None)
        self.family: Family = FAMILIES.get(model_type, GENERIC) if model_type else GENERIC
        self.model_type: str | None = model_type

    # -- facts ---------------------------------------------------------------------------------------

    @property
    def causal(self) -> bool:
        """Whether the model continues its own input: later tokens are then not for a gate to see."""
        generates = getattr(self.root, "can_generate", None)
        return generates is not None and bool(generates()) and not self.encoder_decoder

    def answers(self, path: str) -> bool:
        """Whether a module lies where an encoder-decoder writes its answer, which a gate must not read ahead."""
        inside = self.encoder_decoder and "encoder" not in path.split(".")
        return inside and path not in self.role("input_embedding")

    @property
    def encoder_decoder(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def width(self) -> int:
        """Width of the hidden states (0 where the model has no config that says so)."""
        return int(getattr(self._text_config, "hidden_size", 0) or 0)

    @property
    def _text_config(self) -> Any:
        get = getattr(self.config, "get_text_config", None)
        return self.config if get is None else get()

    @property
    def key_heads(self) -> tuple[int, int]:
        """(number of key heads, width of a head) of the attention, from the config."""
        config = self._text_config
        heads = getattr(config, "num_attention_heads", None)
        if heads is None:
            raise TargetError(
                f"{type(self.root).__name__} has no config that tells its attention heads."
            )
        keys = getattr(config, "num_key_value_heads", None) or heads
        width = (
            getattr(config, "head_dim", None)
            or getattr(config, "d_kv", None)
            or self.width // int(heads)
        )
        return int(keys), int(width)

    def weighted(self, path: str) -> bool:
        """Whether the module at a path is a layer with a weight that Trimtab knows."""
        return view(self.modules[path]) is not None

    @cached_property
    def biased(self) -> list[str]:
        """Layers that have a bias, those of the head included."""
        return [
            path
            for path, module in self.modules.items()
            if (layer := view(module)) is not None and layer.bias() is not None
        ]

    @cached_property
    def blocks(self) -> list[str]:
        """Paths of the transformer blocks, in order; outermost matches only."""
        found = [
            path for path in self.modules if any(glob_match(g, path) for g in self.family.blocks)
        ]
        return [p for p in found if not any(p.startswith(f"{q}.") for q in found)]

    def around(self, path: str) -> nn.Module:
        """The nearest module that encloses ``path`` and has parameters (the root, if none has)."""
        while path:
            path = path.rpartition(".")[0]
            if next(self.modules[path].parameters(), None) is not None:
                return self.modules[path]
        return self.root

    def block_of(self, path: str) -> int | None:
        """Index of the block that holds ``path``."""
        for index, block in enumerate(self.blocks):
            if path == block or path.startswith(f"{block}."):
                return index
        return None

    @cached_property
    def experts(self) -> dict[str, str]:
        """Path of each 3-D expert parameter -> path of the experts module that holds it."""
        return {
            f"{path}.{name}": path
            for path, module in self.modules.items()
            for name in expert_parameters(module)
        }

    def expert_layers(self, path: str) -> list[Layer]:
        """Each expert's slice of the expert parameter at a path."""
        module, name = self.modules[self.experts[path]], path.rpartition(".")[2]
        count = module.get_parameter(name).shape[0]
        return [ExpertLayer.of(module, name, expert) for expert in range(count)]

    @cached_property
    def linears(self) -> list[str]:
        """Every linear layer and expert parameter but the output head."""
        heads = set(self.head)
        found = [
            path
            for path, module in self.modules.items()
            if path not in heads and _is_linear(module)
        ]
        order = {path: number for number, path in enumerate(self.modules)}
        return sorted(
            [*found, *self.experts], key=lambda p: order.get(p, order.get(p.rpartition(".")[0], 0))
        )

    @cached_property
    def head(self) -> list[str]:
        """The output head: what transformers calls so, and classification heads by their usual names."""
        names = ("lm_head", "score", "classifier", "qa_outputs", "cls", "embed_out", "head")
        found = [path for path in self.modules if path.split(".")[0] in names]
        return [path for path in found if view(self.modules[path]) is not None]

    @cached_property
    def norms(self) -> list[str]:
        return [
            path
            for path, m in self.modules.items()
            if (layer := view(m)) is not None and layer.kind == "norm"
        ]

    @cached_property
    def whole(self) -> list[str]:
        """Every layer with a weight; but no embedding that only lends its weight to those that are called."""
        called = set(self.role("embeddings"))
        owners = {id(self.modules[path].weight) for path in called}
        lenders = {
            path
            for path, module in self.modules.items()
            if path not in called
            and isinstance(module, nn.Embedding)
            and id(module.weight) in owners
        }
        found = [path for path in self.modules if self.weighted(path) and path not in lenders]
        return [*found, *self.experts]

    def role(self, role: str) -> list[str]:
        """Paths of a role, in model order; empty where this architecture has none."""
        if role == "all-linear":
            return self.linears
        if role == "head":
            return self.head
        if role == "norms":
            return self.norms
        if role == "all":
            return self.whole
        globs = {
            "attention": self.family.attention,
            "mlp": self.family.mlp,
            "queries": self.family.queries,
            "keys": self.family.keys,
            "values": self.family.values,
            "fused_qkv": self.family.fused_qkv,
            "attention_output": self.family.attention_output,
            "mlp_output": self.family.mlp_output,
            "mlp_down": self.family.mlp_down,
            "embeddings": self.family.embeddings,
            "input_embedding": self.family.input_embedding,
            "self_attention": self.family.self_attention,
        }[role]
        pool = [*self.modules, *self.experts, *self.aliases]
        matched = [path for path in pool if any(glob_match(g, path) for g in globs)]
        found = list(dict.fromkeys(self.aliases.get(path, path) for path in matched))
        if role in ("attention", "mlp"):
            parents = tuple(f"{path}." for path in found)
            return [p for p in self.linears if p in found or p.startswith(parents)]
        return found

    # -- selectors -----------------------------------------------------------------------------------

    def select(
        self,
        targets: str | Sequence[str],
        exclude: str | Sequence[str] = (),
        layers: Sequence[int] | None = None,
    ) -> list[str]:
        """Paths matched by the selectors, in model order.

        Raises:
            TargetError: a selector, an exclusion or a layer index that matches nothing.
        """
        chosen: dict[str, None] = {}
        for selector in _listed(targets):
            chosen.update(dict.fromkeys(self._matches(selector)))
        if not chosen:
            raise TargetError(
                "no targets: name at least one module, glob, regular expression or role."
            )
        dropped: set[str] = set()
        for selector in _listed(exclude):
            matched = chosen.keys() & self._matches(selector)
            if not matched:
                raise TargetError(
                    f"exclude {selector!r} excludes none of the selected modules; remove or correct it."
                )
            dropped |= matched
        paths = [path for path in chosen if path not in dropped]
        if layers is not None:
            paths = self._in_layers(paths, layers)
        if not paths:
            raise TargetError("the exclusions leave no module to adapt.")
        return self.ordered(paths)

    def ordered(self, paths: Iterable[str]) -> list[str]:
        order = {path: number for number, path in enumerate([*self.modules, *self.experts])}
        return sorted(paths, key=lambda path: order[path])

    def _matches(self, selector: str) -> list[str]:
        if selector in ROLES and (found := self.role(selector)):
            return found
        pool = [*(path for path in self.modules if path), *self.experts, *self.aliases]
        if selector.startswith("re:"):
            try:
                pattern = re.compile(selector[3:])
            except re.error as error:
                raise TargetError(
                    f"target {selector!r} is not a regular expression: {error}."
                ) from None
            found = [path for path in pool if pattern.fullmatch(path)]
        elif any(char in selector for char in "*?["):
            found = [path for path in pool if glob_match(selector, path)]
        else:
            found = [path for path in pool if path == selector or path.endswith(f".{selector}")]
        if not found and selector in ROLES:
            raise TargetError(
                f"target {selector!r}: {type(self.root).__name__} has no module in that role. "
                "Name modules, a glob or 're:' and a regular expression instead."
            )
        if not found:
            names = (
                {".".join(path.split(".")[-k:]) for path in pool for k in (1, 2)}
                | set(pool)
                | set(ROLES)
            )
            hint = suggest(selector, [name for name in names if not name.isdigit()])
            raise TargetError(
                f"target {selector!r} matches no module of {type(self.root).__name__}.{hint}"
            )
        return [self.aliases.get(path, path) for path in found]

    def _in_layers(self, paths: Sequence[str], layers: Sequence[int]) -> list[str]:
        count = len(self.blocks)
        if not count:
            raise TargetError(
                f"layers {list(layers)}: {type(self.root).__name__} has no transformer blocks that Trimtab knows."
            )
        wrong = [index for index in layers if not -count <= index < count]
        if wrong:
            raise TargetError(
                f"layers {wrong} do not exist: {type(self.root).__name__} has blocks 0 to {count - 1}."
            )
        wanted = {index % count for index in layers}
        kept = [path for path in paths if self.block_of(path) in wanted]
        if not kept:
            raise TargetError(f"no selected module lies in layers {sorted(wanted)}.")
        return kept


def glob_match(pattern: str, path: str) -> bool:
    """``*`` matches within a segment, ``**.`` any number of leading segments (none included)."""
    return _compiled(pattern).fullmatch(path) is not None


_PATTERNS: dict[str, re.Pattern[str]] = {}


def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern not in _PATTERNS:
        text = re.escape(pattern).replace(r"\*\*\.", r"(?:.*\.)?").replace(r"\*\*", ".*")
        text = text.replace(r"\*", r"[^.]*").replace(r"\?", "[^.]")
        _PATTERNS[pattern] = re.compile(text)
    return _PATTERNS[pattern]


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _is_linear(module: nn.Module) -> bool:
    layer = view(module)
    return layer is not None and layer.kind == "linear"
