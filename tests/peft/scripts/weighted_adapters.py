"""New adapters out of old ones: the kinds of `add_weighted_adapter` that draw no random numbers and mix no factors."""

from peft import LoraConfig, get_peft_model

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
batch = kit.padded()
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
model = get_peft_model(kit.loud(tiny.llama()), config, adapter_name="a")
model.add_adapter("b", config)
kit.filled(model, "a")
kit.filled(model, "b")
model.eval()

KINDS = {
    "cat": {},
    "svd": {"svd_rank": 8},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5, "svd_rank": 8},
    "magnitude_prune_svd": {"density": 0.5, "svd_rank": 8},
}
outputs = {}
ranks = {}
for kind, options in KINDS.items():
    model.add_weighted_adapter(
        ["a", "b"], [0.7, 0.3], adapter_name=kind, combination_type=kind, **options
    )
    model.set_adapter(kind)
    with torch.no_grad():
        outputs[kind] = kit.total(model(**batch))
    ranks[kind] = model.peft_config[kind].r

results = {"outputs": outputs, "ranks": ranks, "adapters": sorted(model.peft_config)}
