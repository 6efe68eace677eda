"""Where and how much: patterns of ranks and alphas, layers, exclusions, regular expressions, rsLoRA, biases."""

from peft import LoraConfig, get_peft_model

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

CONFIGS = {
    "ranks": LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 4},
        alpha_pattern={"v_proj": 64},
    ),
    "layers": LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
    ),
    "excluded": LoraConfig(
        r=4, target_modules="all-linear", exclude_modules=["gate_proj", "o_proj"]
    ),
    "regex": LoraConfig(r=4, target_modules=r".*layers\.[01]\..*(up|down)_proj", use_rslora=True),
    "head": LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    "embedding": LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"]),
}
found = {}
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    model = get_peft_model(kit.loud(tiny.llama()), config)
    names = kit.filled(model)
    with torch.no_grad():
        found[name] = {
            "names": names,
            "printed": kit.printed(model),
            "logits": kit.total(model.eval()(**kit.padded())),
        }

biased = get_peft_model(
    kit.loud(tiny.gpt2()),
    LoraConfig(r=4, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True),
)
results = {**found, "biased": biased.get_nb_trainable_parameters()[0]}
