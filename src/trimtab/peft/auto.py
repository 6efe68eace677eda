"""`AutoPeftModel` and its kin: an adapter together with the base that its configuration names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from trimtab.errors import ConfigError
from trimtab.peft.config import PeftConfig
from trimtab.peft.hub import OPTIONS, local_adapter, optional_file
from trimtab.peft.model import PeftModel
from trimtab.peft.task_models import class_of
from trimtab.peft.types import TaskType

_TOKENIZER = "tokenizer_config.json"
_OF_ADAPTER = (
    "autocast_adapter_dtype", "ephemeral_gpu_offload", "low_cpu_mem_usage", "key_mapping", "subfolder",
)  # fmt: skip
_ALLOWED = ("transformers", "diffusers", "sentence_transformers", "timm")


class AutoBase:
    """What the classes share: `from_pretrained`."""

    task: ClassVar[TaskType | None] = None
    loads: ClassVar[Any] = None
    """The class of transformers that loads the base; without one, the adapter's configuration names it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"{type(self).__name__} is not made by calling it; use {type(self).__name__}.from_pretrained(name)."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base that an adapter of a folder or a repository names, with that adapter.

        Args:
            pretrained_model_name_or_path: the adapter.
            revision: of the adapter; the base's is in its configuration.
            import_allowlist: packages from which the base's class may come, where the adapter names one.
            kwargs: of the hub (``token``, ``cache_dir``, ``subfolder``, …) for both; what `PeftModel.from_pretrained`
                knows is for the adapter; everything else is for the base (``dtype``, ``device_map``, …).

        Raises:
            ConfigError: the adapter is of another task than the class, or it cannot be told which class its base has.
        """
        hub = {key: kwargs.pop(key) for key in list(kwargs) if key in OPTIONS}
        own = {key: kwargs.pop(key) for key in list(kwargs) if key in _OF_ADAPTER}
        place = str(pretrained_model_name_or_path)
        subfolder = own.pop("subfolder", None)
        folder = local_adapter(place, subfolder, **hub, revision=revision)
        found = PeftConfig.from_pretrained(folder) if config is None else config
        cls._fits(found, place)
        if not found.base_model_name_or_path:
            raise ConfigError(
                f"{place} does not say which model it is for; load that yourself and call "
                "PeftModel.from_pretrained(model, name)."
            )
        loads = cls.loads or _class_of(found, hub, tuple(import_allowlist or _ALLOWED))
        base = loads.from_pretrained(
            found.base_model_name_or_path, revision=found.revision, **hub, **kwargs
        )
        _fit_vocabulary(base, place, subfolder, {**hub, "revision": revision}, kwargs)
        made = class_of(cls.task)
        return made.from_pretrained(base, folder, adapter_name, is_trainable, config, **own)

    @classmethod
    def _fits(cls, config: PeftConfig, place: str) -> None:
        if config.task_type in (None, cls.task):
            return
        right = f"AutoPeftModel{class_of(config.task_type).__name__.removeprefix('PeftModel')}"
        raise ConfigError(
            f"{place} is an adapter of task_type {config.task_type and str(config.task_type)!r}; load it with {right}, "
            f"not with {cls.__name__}."
        )


def _class_of(config: PeftConfig, hub: dict[str, Any], allowed: tuple[str, ...]) -> Any:
    """The class of a base that an adapter without a task names: in ``auto_mapping``, or by the base's own config."""
    mapping = config.auto_mapping or {}
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    if library and name:
        if library.partition(".")[0] not in allowed:
            raise ConfigError(
                f"the adapter's base is a {name} of {library!r}, a package that nobody allowed it to import. If you "
                f"trust it, pass import_allowlist=[{library.partition('.')[0]!r}]."
            )
        __import__(library)
        return getattr(sys.modules[library], name)
    options = {**hub, "revision": config.revision}
    described = AutoConfig.from_pretrained(config.base_model_name_or_path, **options)
    for architecture in described.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    raise ConfigError(
        f"neither the adapter nor {config.base_model_name_or_path!r} says which class the model has; load it "
        "yourself and call PeftModel.from_pretrained(model, name)."
    )


def _fit_vocabulary(
    base: nn.Module, place: str, subfolder: str | None, hub: dict[str, Any], given: dict[str, Any]
) -> None:
    """Grow the base's embeddings where a tokenizer beside the adapter has more tokens."""
    found = optional_file(place, _TOKENIZER, subfolder, **hub)
    embeddings = getattr(base, "get_input_embeddings", None)
    if found is None or embeddings is None:
        return
    trust = {key: given[key] for key in ("trust_remote_code",) if key in given}
    if Path(place).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(found.parent, **trust)
    else:
        tokenizer = AutoTokenizer.from_pretrained(
            place, **hub, **trust, **({"subfolder": subfolder} if subfolder else {})
        )
    if len(tokenizer) > embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]


class AutoPeftModel(AutoBase):
    """Of an adapter without a task."""


class AutoPeftModelForCausalLM(AutoBase):
    """For ``task_type="CAUSAL_LM"``."""

    task, loads = TaskType.CAUSAL_LM, AutoModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoBase):
    """For ``task_type="SEQ_2_SEQ_LM"``."""

    task, loads = TaskType.SEQ_2_SEQ_LM, AutoModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoBase):
    """For ``task_type="SEQ_CLS"``."""

    task, loads = TaskType.SEQ_CLS, AutoModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoBase):
    """For ``task_type="TOKEN_CLS"``."""

    task, loads = TaskType.TOKEN_CLS, AutoModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoBase):
    """For ``task_type="QUESTION_ANS"``."""

    task, loads = TaskType.QUESTION_ANS, AutoModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoBase):
    """For ``task_type="FEATURE_EXTRACTION"``."""

    task, loads = TaskType.FEATURE_EXTRACTION, AutoModel
