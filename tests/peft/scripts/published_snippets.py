"""The snippets that everybody copies, on models of the usual kinds: what they print."""

from peft import LoraConfig, TaskType, get_peft_model

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

MODELS = {
    "llama": (tiny.llama, ["q_proj", "v_proj"]),
    "mistral": (tiny.mistral, ["q_proj", "v_proj"]),
    "gpt2": (tiny.gpt2, ["c_attn"]),
    "bert": (tiny.bert, ["query", "value"]),
    "t5": (tiny.t5, ["q", "v"]),
    "falcon": (tiny.falcon, ["query_key_value"]),
    "bloom": (tiny.bloom, ["query_key_value"]),
    "vit": (tiny.vit, r".*\.(q_proj|query|v_proj|value)"),
}
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "vit": None}
torch.manual_seed(0)
results = {}
for name, (make, targets) in MODELS.items():
    fan = name == "gpt2"
    first = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=targets,
        lora_dropout=0.05,
        fan_in_fan_out=fan,
        task_type=TASKS.get(name, TaskType.CAUSAL_LM),
    )
    second = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=targets,
        lora_dropout=0.1,
        bias="none",
        fan_in_fan_out=fan,
    )
    made = [get_peft_model(make(), config) for config in (first, second)]
    names = [[n for n, p in model.named_parameters() if p.requires_grad] for model in made]
    results[name] = [*(kit.printed(model) for model in made), *(sorted(each) for each in names)]
defaults = [get_peft_model(make(), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=make is tiny.gpt2))
            for make in (tiny.llama, tiny.mistral, tiny.gpt2, tiny.falcon, tiny.bloom)]  # fmt: skip
results["default targets"] = [kit.printed(model) for model in defaults]
