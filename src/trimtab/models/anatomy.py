"""The anatomy of one model: its modules by role, its blocks, its entries, and how selectors match them.

Paths are canonical: those of the bare model, whether or not adapters are attached (a wrapped layer's
``base_layer`` does not show). Expert parameters stored in three dimensions are sites of their own, at
the path of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, cast

from torch import nn

from trimtab.errors import TargetError
from trimtab.frozen import Layer, view
from trimtab.frozen.experts import ExpertLayer, expert_count, expert_parameters
from trimtab.frozen.multihead import OUTPUT, PARAMETER, InputProjection, opens
from trimtab.frozen.sublayer import SubLayer
from trimtab.models.attention_layer import AttentionLayer
from trimtab.models.families import GENERIC, HEADS, family_of
from trimtab.models.family import Family
from trimtab.models.fused import Fused, FusedRows
from trimtab.models.globs import glob_match
from trimtab.models.heads import Heads, heads_of
from trimtab.models.selectors import selected


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
        self.family: Family = family_of(self.config)
        self._found: dict[str, list[str]] = {}
        self.model_type: str | None = getattr(self.config, "model_type", None)

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

    def width_at(self, path: str) -> int:
        """Width of the hidden states around a module: towers of one model may differ."""
        return int(getattr(self._config_at(path), "hidden_size", 0) or 0)

    def _config_at(self, path: str) -> Any:
        """The nearest config around a module that tells a width; else the model's."""
        while path:
            config = self.modules[path].__dict__.get("config") if path in self.modules else None
            if getattr(config, "hidden_size", None):
                return config
            path = path.rpartition(".")[0]
        return self._text_config

    @property
    def key_heads(self) -> tuple[int, int]:
        """(number of key heads, width of a head) of the attention, from the config."""
        return self.key_heads_at("")

    def key_heads_at(self, path: str) -> tuple[int, int]:
        """`key_heads` at a module: towers of one model may differ."""
        heads = self._heads_at(path)
        return heads.keys, heads.width

    def _heads_at(self, path: str) -> Heads:
        found = heads_of(self._config_at(path))
        if found is None:
            raise TargetError(
                f"{type(self.root).__name__} has no config that tells its attention heads."
            )
        return found

    def fused_rows(self, path: str) -> FusedRows:
        """Which output rows of the fused projection at a path are queries, keys and values."""
        return self.fused(path).rows

    def fused(self, path: str) -> Fused:
        """How the output rows of the fused projection at a path divide.

        Raises:
            TargetError: it is not known for this architecture, or the layer has another number of rows than the
                config's heads need.
        """
        if self.config is not None and self.family is GENERIC:
            raise TargetError(
                f"which outputs of {path!r} are keys and values is not known for {type(self.root).__name__}; name "
                "targets yourself."
            )
        layer = view(self.modules[path])
        rows = 0 if layer is None else layer.out_features
        if self.config is None:
            found = Fused(1, rows // 3, rows // 3)  # as timm and torch stack them
        else:
            found = self._heads_at(path).fused(grouped=self.family.fused == "grouped")
        if found.outputs != rows:
            raise TargetError(
                f"{path!r} has {rows} outputs, and {found.outputs} are needed for its queries, keys and values; "
                "name targets whose outputs are keys or values alone."
            )
        return found

    def query_heads_at(self, path: str) -> int:
        """Number of query heads of the attention at a module."""
        return self._heads_at(path).queries

    def tied(self, path: str) -> list[str]:
        """Other modules whose weight is the very one of the module at a path (of experts: none)."""
        if path not in self.modules:
            return []
        weight = self.modules[path]._parameters.get("weight")
        return [other for other in self._by_weight.get(id(weight), ()) if other != path]

    @cached_property
    def _by_weight(self) -> dict[int, list[str]]:
        """Modules by the identity of their weight."""
        found: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            weight = module._parameters.get("weight")
            if weight is not None:
                found.setdefault(id(weight), []).append(path)
        return found

    def weighted(self, path: str) -> bool:
        """Whether the module at a path is a layer with a weight that Trimtab knows."""
        return view(self.modules[path]) is not None

    @cached_property
    def biased(self) -> list[str]:
        """Layers that have a bias, those of the head included."""
        return [
            path
            for path, module in self.modules.items()
            if path not in self.uncalled
            and (layer := view(module)) is not None
            and layer.bias() is not None
        ]

    @cached_property
    def blocks(self) -> list[str]:
        """Paths of the transformer blocks, in order; outermost matches only."""
        found = [
            path for path in self.modules if any(glob_match(g, path) for g in self.family.blocks)
        ]
        return [p for p in found if not any(p.startswith(f"{q}.") for q in found)]

    @cached_property
    def apart(self) -> list[str]:
        """Modules that are called once per owner where a batch mixes adapters."""
        return [p for p in self.modules if any(glob_match(g, p) for g in self.family.apart)]

    @cached_property
    def uncalled(self) -> list[str]:
        """Layers whose weight is read without calling them (torch's own attention does so too)."""
        found = [p for p in self.modules if any(glob_match(g, p) for g in self.family.uncalled)]
        attention = [p for p, m in self.modules.items() if isinstance(m, nn.MultiheadAttention)]
        return [*found, *(f"{path}.{OUTPUT}" if path else OUTPUT for path in attention)]

    def around(self, path: str) -> nn.Module:
        """The nearest module that encloses ``path`` and has parameters (the root, if none has)."""
        while path:
            path = path.rpartition(".")[0]
            if next(self.modules[path].parameters(), None) is not None:
                return self.modules[path]
        return self.root

    def inside(self, path: str, kind: type[nn.Module]) -> bool:
        """Whether a module of that kind encloses ``path``."""
        parts = path.split(".")[:-1]
        around = (".".join(parts[:length]) for length in range(len(parts) + 1))
        return any(isinstance(self.modules.get(parent), kind) for parent in around)

    def block_of(self, path: str) -> int | None:
        """Index of the block that holds ``path``."""
        while path and path not in self._numbers:
            path = path.rpartition(".")[0]
        return self._numbers.get(path)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {path: number for number, path in enumerate(self.blocks)}

    def inputs_of(self, paths: Sequence[str]) -> list[str]:
        """The input embeddings that these modules hear from: of their own tower, where a model has several."""
        found = self.role("input_embedding")
        towers = {path.partition(".")[0] for path in paths}
        return [p for p in found if len(found) == 1 or towers == {p.partition(".")[0]}]

    @cached_property
    def experts(self) -> dict[str, str]:
        """Path of each 3-D expert parameter -> path of the experts module that holds it."""
        return {
            f"{path}.{name}": path
            for path, module in self.modules.items()
            for name in expert_parameters(module)
        }

    @cached_property
    def opened(self) -> dict[str, str]:
        """Path of the input projection of each ``nn.MultiheadAttention``, which is a parameter -> its own path."""
        found = [path for path, module in self.modules.items() if path and opens(module)]
        return {f"{path}.{PARAMETER}": path for path in found if self.weighted(f"{path}.{OUTPUT}")}

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Path of each parameter that is a site -> path of the module that holds it."""
        return {**self.experts, **self.opened}

    def layer(self, path: str) -> Layer:
        """The view of the layer at a path (of expert 0 at an expert parameter, of a sub-layer's output)."""
        if path in self.experts:
            return self.expert_layers(path)[0]
        if path in self.opened:
            return InputProjection(cast(nn.MultiheadAttention, self.modules[self.opened[path]]))
        if path in self.attentions:
            return AttentionLayer.at(self, path)
        module = self.modules[path]
        return view(module, self.root) or SubLayer(module, self.width_at(path), self.around(path))

    def expert_layers(self, path: str) -> list[Layer]:
        """Each expert's slice of the expert parameter at a path."""
        module, name = self.modules[self.experts[path]], path.rpartition(".")[2]
        return [ExpertLayer.of(module, name, one) for one in range(expert_count(module, name))]

    @cached_property
    def linears(self) -> list[str]:
        """Every linear layer that is called, and every expert parameter; but not the output head."""
        without = {*self.head, *self.uncalled}
        found = [
            path
            for path, module in self.modules.items()
            if path not in without and _is_linear(module)
        ]
        order = {path: number for number, path in enumerate(self.modules)}
        return sorted(
            [*found, *self.experts], key=lambda p: order.get(p, order.get(p.rpartition(".")[0], 0))
        )

    @cached_property
    def head(self) -> list[str]:
        """The output head: what transformers calls so, and classification heads by their usual names."""
        found = [path for path in self.modules if path.split(".")[0] in HEADS]
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
        lenders |= set(self.uncalled)
        found = [path for path in self.modules if self.weighted(path) and path not in lenders]
        return [*found, *self.experts]

    @cached_property
    def attentions(self) -> frozenset[str]:
        """Paths of the self-attentions."""
        return frozenset(self.role("self_attention"))

    def role(self, role: str) -> list[str]:
        """Paths of a role, in model order; empty where this architecture has none."""
        if role not in self._found:
            self._found[role] = self._role(role)
        return list(self._found[role])

    def _role(self, role: str) -> list[str]:
        if role == "all-linear":
            return self.linears
        if role == "head":
            return self.head
        if role == "norms":
            return self.norms
        if role == "blocks":
            return self.blocks
        if role == "all":
            return self.whole
        globs = self.family.roles[role]
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
        """Paths matched by selectors, in model order (see `trimtab.models.selectors`).

        Raises:
            TargetError: a selector, an exclusion or a layer index that matches nothing.
        """
        return selected(self, targets, exclude, layers)

    def ordered(self, paths: Iterable[str]) -> list[str]:
        order = {path: number for number, path in enumerate([*self.modules, *self.parameters])}
        return sorted(paths, key=lambda path: order[path])

    def projections(self, paths: Sequence[str]) -> list[str]:
        """These paths; in the place of a ``nn.MultiheadAttention``, which has no weight of its own, its projections."""
        inside = {p: [inner, f"{p}.{OUTPUT}"] for inner, p in self.opened.items()}
        found = [each for path in paths for each in inside.get(path, [path])]
        return list(dict.fromkeys(found))


def _is_linear(module: nn.Module) -> bool:
    layer = view(module)
    return layer is not None and layer.kind == "linear"
