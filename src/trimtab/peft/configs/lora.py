"""`LoraConfig`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from typing import Any, ClassVar, Literal

from torch import nn

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.contract import Init, Method, kaiming_uniform, normal, uniform
from trimtab.adapt.factors import OFFSET
from trimtab.adapt.initial import again
from trimtab.adapt.lowrank_in_peft import VARIANTS
from trimtab.adapt.parse import methods
from trimtab.adapt.repeat import repeat_blocks
from trimtab.adapt.routed import routed
from trimtab.adapt.tied import group
from trimtab.adapt.tree import anatomy_of, walk
from trimtab.errors import ConfigError, UnknownNameError, UnsupportedError, suggest
from trimtab.models.repeat import repeated
from trimtab.peft.config import PeftConfig, config, option
from trimtab.peft.configs.common import Excluding, Layered, Transposed, listed
from trimtab.peft.configs.lora_parts import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from trimtab.peft.errors import PeftWarning
from trimtab.peft.types import PeftType

_INITS = ("gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga", "corda", "loftq", "mica")
_NITER = re.compile(r"pissa_niter_\d+")
_CONFIGS: dict[str, Any] = {
    "eva_config": EvaConfig,
    "lora_ga_config": LoraGAConfig,
    "corda_config": CordaConfig,
    "kasa_config": KasaConfig,
    "use_bdlora": BdLoraConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "arrow_config": ArrowConfig,
}
_OTHERS = (*VARIANTS, "alora_invocation_tokens", "arrow_config")
"""Options of which one alone can be set."""


@config(PeftType.LORA)
class LoraConfig(Excluding, Layered, Transposed):
    """LoRA; DoRA with ``use_dora``, rsLoRA with ``use_rslora``."""

    prefix: ClassVar[str] = "lora_"
    sizes: ClassVar[tuple[str, ...]] = ("r",)
    shares: ClassVar[tuple[str, ...]] = ("lora_dropout",)
    lacks: ClassVar[dict[str, str]] = {
        "megatron_config": "Layers of Megatron are not known here.",
    }

    r: int = option("Rank: rows of A and columns of B.", default=8)
    lora_alpha: int = option("The product is scaled by lora_alpha / r.", default=8)
    lora_dropout: float = option("Of what enters A, in training.", default=0.0)
    bias: Literal["none", "all", "lora_only"] = option(
        "Biases that are trained too: 'none', 'all' or 'lora_only' (those of the targets).",
        default="none",
    )
    use_rslora: bool = option("Scale by lora_alpha / √r instead.", default=False)
    init_lora_weights: bool | str = option(
        "How factors begin: True, False (at random), gaussian, orthogonal, pissa, pissa_niter_N, olora, eva, lora_ga, "
        "corda, loftq, mica.",
        default=True,
    )
    rank_pattern: dict[str, int] | None = option("End of a module's name -> its rank.", default={})
    alpha_pattern: dict[str, float] | None = option(
        "End of a module's name -> its alpha.", default={}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        "Tokens whose embeddings are trained too; by the name of a layer where there are several.",
        default=None,
    )
    use_dora: bool = option(
        "DoRA: train the magnitude of each output channel apart.", default=False
    )
    eva_config: EvaConfig | dict[str, Any] | None = option(
        "Options of init_lora_weights='eva'.", default=None
    )
    lora_ga_config: LoraGAConfig | dict[str, Any] | None = option(
        "Options of init_lora_weights='lora_ga'.", default=None
    )
    target_parameters: list[str] | None = option(
        "Parameters of experts, by the end of their names.", default=None
    )
    megatron_config: dict[str, Any] | None = option("Not in Trimtab.", default=None)
    megatron_core: str | None = option("Not in Trimtab; no effect.", default="megatron.core")
    loftq_config: LoftQConfig | dict[str, Any] = option(
        "Options of init_lora_weights='loftq'; kept as a mapping.", default={}
    )
    corda_config: CordaConfig | dict[str, Any] | None = option(
        "Options of init_lora_weights='corda'.", default=None
    )
    velora_config: VeloraConfig | dict[str, Any] | None = option(
        "VeLoRA: keep little of the inputs for backward.", default=None
    )
    alora_invocation_tokens: list[int] | None = option(
        "aLoRA: act only from the last occurrence of these tokens in a row on.", default=None
    )
    use_qalora: bool = option(
        "QA-LoRA: A sees means of groups of inputs. Here on any linear layer, in PEFT on GPTQ's alone.",
        default=False,
    )
    qalora_group_size: int = option("Inputs of a group of QA-LoRA.", default=16)
    monteclora_config: MontecloraConfig | dict[str, Any] | None = option(
        "MonteCLoRA: draw around A in training.", default=None
    )
    layer_replication: list[tuple[int, int]] | None = option(
        "Ranges of the model's layers that stand in a row, repeated with the same frozen weights.",
        default=None,
    )
    runtime_config: LoraRuntimeConfig = field(
        default_factory=LoraRuntimeConfig,
        metadata={"help": "Settings of the process; not in a file."},
    )
    lora_bias: bool = option("Train a bias of B, which is scaled as the product is.", default=False)
    use_bdlora: BdLoraConfig | dict[str, Any] | None = option(
        "BD-LoRA: one factor is block-diagonal.", default=None
    )
    arrow_config: ArrowConfig | dict[str, Any] | None = option(
        "Route each token among attached LoRAs; `create_arrow_model` makes one.", default=None
    )
    kasa_config: KasaConfig | dict[str, Any] | None = option(
        "KaSA: learnt singular values in the place of the base's least ones.", default=None
    )
    ensure_weight_tying: bool = option(
        "Whether an embedding and a head that share their weight share what is trained of them, too.",
        default=False,
    )

    def check(self) -> None:
        super().check()
        kind = type(self).__name__
        for name, made in _CONFIGS.items():
            if isinstance(value := getattr(self, name), dict):
                setattr(self, name, made(**value))
        given = self.loftq_config
        if given:
            made = given if isinstance(given, LoftQConfig) else LoftQConfig(**given)
            self.loftq_config = asdict(made)
        if self.bias not in ("none", "all", "lora_only"):
            hint = suggest(str(self.bias), ("none", "all", "lora_only"))
            raise ConfigError(
                f"{kind}: bias must be none, all or lora_only, not {self.bias!r}.{hint}"
            )
        self._check_init(kind)
        self._check_variant(kind)
        if self.runtime_config.ephemeral_gpu_offload:
            raise UnsupportedError(
                f"{kind}: ephemeral_gpu_offload is not in Trimtab; DoRA finds its norms without the whole product."
            )

    def _check_init(self, kind: str) -> None:
        init = self.init_lora_weights
        if isinstance(init, bool):
            return
        text = str(init).lower()
        if text not in _INITS and not _NITER.fullmatch(text):
            hint = (
                suggest(text, _INITS)
                or f" There are: True, False, {', '.join(_INITS)}, pissa_niter_N."
            )
            raise UnknownNameError(f"{kind}: init_lora_weights={init!r} is not known.{hint}")

    def _check_variant(self, kind: str) -> None:
        chosen = [name for name in _OTHERS if getattr(self, name)]
        if str(self.init_lora_weights).lower() == "mica":
            chosen.append("init_lora_weights='mica'")
        if len(chosen) > 1:
            raise ConfigError(
                f"{kind}: {' and '.join(chosen)} do not go together; each makes it another method."
            )

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        del fields["runtime_config"]
        return fields

    def options(self) -> dict[str, Any]:
        found = super().options()
        for name in ("runtime_config", "init_lora_weights"):
            del found[name]
        return found

    @property
    def _init(self) -> str:
        """Our name of the initialisation."""
        text = str(self.init_lora_weights).lower()
        if isinstance(self.init_lora_weights, bool):
            return "default"
        if text == "eva" and isinstance(self.eva_config, EvaConfig):
            return self.eva_config.init
        if text == "lora_ga":
            given = self.lora_ga_config
            return (given if isinstance(given, LoraGAConfig) else LoraGAConfig()).init
        if text == "corda":
            of_corda = self.corda_config
            return (of_corda if isinstance(of_corda, CordaConfig) else CordaConfig()).init
        if text == "loftq":
            return again({"init_lora_weights": "loftq", "loftq_config": self.loftq_config})
        return text

    def prepare(self, model: nn.Module) -> None:
        if not self.layer_replication:
            return
        wanted = tuple((start, stop) for start, stop in self.layer_replication)
        found = repeated(walk(model))
        if found is None:
            repeat_blocks(model, wanted)
        elif found.ranges != wanted:
            raise ConfigError(
                f"layer_replication={list(wanted)}: this model's layers are repeated already, as {list(found.ranges)}."
            )

    def made(self, adapters: Mapping[str, Adapter], name: str) -> Adapter | None:
        given = self.arrow_config
        if not isinstance(given, ArrowConfig):
            return None
        lacking = [n for n in given.task_adapter_names or [] if n not in adapters]
        if lacking or not given.task_adapter_names:
            raise ConfigError(
                f"arrow_config: task_adapter_names={given.task_adapter_names!r} are to be attached LoRAs; there are "
                f"{list(adapters)}. create_arrow_model(model, folders, arrow_config) loads and names them."
            )
        general = given.gks_adapter_names or [] if given.use_gks else []
        return routed(
            [adapters[n] for n in given.task_adapter_names],
            general=[adapters[n] for n in general],
            top_k=given.top_k,
            temperature=given.router_temperature,
            seed=given.rng_seed or 0,
            name=name,
        )

    def begun(self, method: Method, model: nn.Module) -> Method:
        init = self._init
        if self.batches is None and init.startswith("eva"):
            init = "default"
            warnings.warn(
                "init_lora_weights='eva': the adapter begins without data; call initialize_lora_eva_weights(model, "
                "dataloader) before training.",
                category=PeftWarning,
                stacklevel=2,
            )
        if self.batches is None and init.startswith("lora-ga"):
            raise ConfigError(
                "init_lora_weights='lora_ga' begins from data: call preprocess_loraga(model, config, train_step) first."
            )
        if self.batches is None and init.startswith("corda"):
            raise ConfigError(
                "init_lora_weights='corda' begins from data: call preprocess_corda(model, config, run_model) first."
            )
        self._warn_of_ends(method, model)
        if init.startswith("loftq"):
            self._warn_of_scale()
        return self._with_tokens(method.replace(init=init), model)

    def _warn_of_ends(self, method: Method, model: nn.Module) -> None:
        """Say so where nothing that is trained is tied."""
        if not self.ensure_weight_tying or self.trainable_token_indices:
            return
        anatomy = anatomy_of(model)
        full = anatomy.select(tuple(self.modules_to_save)) if self.modules_to_save else []
        if not any(
            group(anatomy, path) for path in [*(p.path for p in method.place(anatomy)), *full]
        ):
            warnings.warn(
                "ensure_weight_tying: nothing that is trained shares its weight with an embedding, so it does nothing.",
                category=PeftWarning,
                stacklevel=2,
            )

    def _warn_of_scale(self) -> None:
        """PEFT's LoftQ does not divide by the scale."""
        scale = self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
        if scale != 1 or self.rank_pattern or self.alpha_pattern:
            warnings.warn(
                "init_lora_weights='loftq' begins with B A = what rounding lost, and the adapter adds "
                f"{scale:g} · B A: as in PEFT, it does not begin at the base. Set lora_alpha to r, or take "
                "trimtab.LoRA(init='loftq').",
                category=PeftWarning,
                stacklevel=2,
            )

    def first_values(self) -> Mapping[str, Init]:
        if self.init_lora_weights is not False:
            return {}
        linear: dict[str, Init] = dict.fromkeys(("lora_A.weight", "lora_B.weight"), kaiming_uniform)
        linear[OFFSET] = uniform(self.r**-0.5)  # as torch begins the bias of a linear layer
        return linear | dict.fromkeys(("lora_embedding_A", "lora_embedding_B"), normal(1.0))

    def _with_tokens(self, method: Method, model: nn.Module) -> Method:
        """A union with trained rows of embeddings, where there are any."""
        given = self.trainable_token_indices
        if not given:
            return method
        named = given if isinstance(given, dict) else {self._embedding(model): given}
        tied = self._tied(named, model)
        for name, ids in named.items():
            if not tied or name not in tied[1:]:
                rows = {"targets": (name,), "ids": ids, "tie": name in tied}
                method = method | methods.get("tokens").parse(rows)
        return method

    def _tied(self, named: Mapping[str, Sequence[int]], model: nn.Module) -> list[str]:
        """Of the layers whose rows are trained, those that are one: an embedding, then what is tied to it."""
        path, modules = self._embedding(model), anatomy_of(model).modules
        ends = anatomy_of(model).tied(path) if path in modules else []
        homes = [name for name in named if f".{path}".endswith(f".{name}")]
        heads = [name for name in named if any(f".{end}".endswith(f".{name}") for end in ends)]
        if not homes or not ends:
            return []
        if all(list(named[name]) == list(named[homes[0]]) for name in heads):
            return [*homes, *heads]
        if self.ensure_weight_tying:
            raise ConfigError(
                f"ensure_weight_tying: {homes[0]!r} and {heads} share their weight, and trainable_token_indices names "
                "different tokens for them; name the same, or leave one out."
            )
        return []

    @staticmethod
    def _embedding(model: nn.Module) -> str:
        (first, *_) = anatomy_of(model).role("input_embedding") or ["embed_tokens"]
        return first

    @classmethod
    def told(cls, method: Method, options: Mapping[str, Any]) -> PeftConfig:
        lora, *tokens = method.members
        if tokens:
            named = {str(t.targets[0]): list(dict(t)["ids"]) for t in tokens}
            where = {
                "target_modules": listed(lora.targets),
                "exclude_modules": listed(lora.exclude),
            }
            options = {**options, **lora.to_peft(()), **where, "trainable_token_indices": named}
        made = super().told(method, options)
        init = str(dict(lora).get("init", "default"))
        if isinstance(made, LoraConfig) and init != "default":
            name, _, rest = init.replace("lora-ga", "lora_ga").partition("(")
            if "stored=true" in rest:
                return made
            made.init_lora_weights = (
                f"pissa_niter_{rest[6:-1]}" if rest.startswith("niter=") else name
            )
        return made
