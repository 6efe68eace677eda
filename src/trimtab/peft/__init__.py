"""The drop-in face: the names and behaviour of Hugging Face PEFT, on Trimtab's core.

    from trimtab.peft import LoraConfig, get_peft_model

Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "AdaLoraConfig": "configs.adalora",
    "LoraConfig": "configs.lora",
    **dict.fromkeys(("NoMatchingPeftModuleError", "PeftError", "PeftWarning"), "errors"),
    **dict.fromkeys(("get_eva_state_dict", "initialize_lora_eva_weights", "preprocess_loraga"), "informed"),
    "create_arrow_model": "arrow",
    "replace_lora_weights_loftq": "loftq",
    **dict.fromkeys(
        (
            "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification",
        ),
        "auto",
    ),
    **dict.fromkeys(
        (
            "ArrowConfig", "BdLoraConfig", "EvaConfig", "KasaConfig", "LoftQConfig", "LoraGAConfig",
            "LoraRuntimeConfig", "MontecloraConfig", "VeloraConfig",
        ),
        "configs.lora_parts",
    ),
    **dict.fromkeys(
        (
            "FourierFTConfig", "HiraConfig", "LoHaConfig", "LoKrConfig", "MissConfig", "RandLoraConfig", "ShiraConfig",
            "VeraConfig",
        ),
        "configs.weights",
    ),
    **dict.fromkeys(("BOFTConfig", "HRAConfig", "OFTConfig"), "configs.rotations"),
    **dict.fromkeys(("IA3Config", "LNTuningConfig", "TrainableTokensConfig"), "configs.scales"),
    **dict.fromkeys(
        (
            "AdaptionPromptConfig", "PrefixTuningConfig", "PromptEncoderConfig",
            "PromptEncoderReparameterizationType", "PromptLearningConfig", "PromptTuningConfig", "PromptTuningInit",
        ),
        "configs.prompts",
    ),
    **dict.fromkeys(
        (
            "AdaFitConfig", "AdapterPlusConfig", "BitFitConfig", "BottleneckConfig", "CompacterConfig",
            "DiReftConfig", "DiffPruningConfig", "FullConfig", "GatedConfig", "LoReftConfig", "MoraConfig",
            "NoReftConfig", "ParallelConfig", "PfeifferConfig", "PiggybackConfig", "SpotTuneConfig", "UnionConfig",
        ),
        "configs.ours",
    ),
    "PeftModel": "model",
    **dict.fromkeys(("PeftConfig", "get_peft_config"), "config"),
    **dict.fromkeys(("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"), "mapping"),
    **dict.fromkeys(
        (
            "AdaLoraModel", "AdaptionPromptModel", "BOFTModel", "FourierFTModel", "HRAModel", "HiraModel", "IA3Model",
            "LNTuningModel", "LoHaModel", "LoKrModel", "LoraModel", "MissModel", "OFTModel", "RandLoraModel",
            "ShiraModel", "TrainableTokensModel", "VeraModel",
        ),
        "kinds",
    ),
    **dict.fromkeys(("PeftType", "TaskType"), "types"),
    **dict.fromkeys(("TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"), "status"),
    **dict.fromkeys(("convert_to_lora", "save_as_lora"), "conversion"),
    "find_kappa_target_modules": "helpers",
    **dict.fromkeys(
        ("cast_mixed_precision_params", "prepare_model_for_kbit_training", "shift_tokens_right"), "utils.other"
    ),
    **dict.fromkeys(
        (
            "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PeftMixedModel", "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "get_peft_model",
            "inject_adapter_in_model",
        ),
        "task_models",
    ),
    **dict.fromkeys(
        (
            "get_base_model_state_dict", "get_peft_model_state_dict", "load_peft_weights", "set_base_model_state_dict",
            "set_peft_model_state_dict",
        ),
        "state",
    ),
}  # fmt: skip

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
