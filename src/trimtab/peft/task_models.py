"""The class of a `PeftModel` for each task, and the functions that make one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from trimtab.errors import AttachError
from trimtab.peft.config import PeftConfig
from trimtab.peft.kin import related
from trimtab.peft.kinds import tuner_class
from trimtab.peft.model import PeftModel
from trimtab.peft.types import TaskType


@related
class PeftModelForCausalLM(PeftModel):
    """For ``task_type="CAUSAL_LM"``."""


@related
class PeftModelForSeq2SeqLM(PeftModel):
    """For ``task_type="SEQ_2_SEQ_LM"``."""


@related
class PeftModelForSequenceClassification(PeftModel):
    """For ``task_type="SEQ_CLS"``; the classifier is trained too."""

    heads = ("classifier", "score")


@related
class PeftModelForTokenClassification(PeftModel):
    """For ``task_type="TOKEN_CLS"``; the classifier is trained too."""

    heads = ("classifier", "score")


@related
class PeftModelForQuestionAnswering(PeftModel):
    """For ``task_type="QUESTION_ANS"``; the head is trained too."""

    heads = ("qa_outputs",)


@related
class PeftModelForFeatureExtraction(PeftModel):
    """For ``task_type="FEATURE_EXTRACTION"``."""


@related
class PeftMixedModel(PeftModel):
    """A model with adapters of several methods; here every `PeftModel` is one, and so is this."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: Mapping[str, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def class_of(task_type: str | None) -> type[PeftModel]:
    """The class of a task's models."""
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task_type or "", PeftModel)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A model with a new adapter, in the class of its task. The model is changed in place, its weights never.

    Raises:
        AttachError: the model has adapters already.
    """
    if isinstance(model, PeftModel):
        raise AttachError(
            "the model is a PeftModel already; add another adapter with model.add_adapter(name, config)."
        )
    if isinstance(peft_config, PeftConfig) and revision is not None:
        peft_config = peft_config.copied()
        peft_config.revision = revision
    made = PeftMixedModel if mixed else class_of(getattr(peft_config, "task_type", None))
    return made(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The model itself with a new adapter in it, and nothing around it."""
    tuner_class(peft_config.peft_type)(model, peft_config.copied(), adapter_name)
    return model
