"""Further methods, each with a few options: counts, names, outputs and merging."""

from peft import (
    BOFTConfig,
    FourierFTConfig,
    HiraConfig,
    HRAConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

TARGETS = ["q_proj", "v_proj"]
CONFIGS = {
    "loha": LoHaConfig(r=4, alpha=8, target_modules=TARGETS),
    "lokr": LoKrConfig(r=4, alpha=8, target_modules=TARGETS),
    "oft": OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS),
    "boft": BOFTConfig(boft_block_size=8, target_modules=TARGETS),
    "hra": HRAConfig(r=4, target_modules=TARGETS),
    "hira": HiraConfig(r=4, target_modules=TARGETS),
    "miss": MissConfig(r=4, target_modules=TARGETS),
    "fourierft": FourierFTConfig(n_frequency=20, target_modules=TARGETS),
    "vera": VeraConfig(r=8, target_modules=TARGETS),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}
results = {}
for method, config in CONFIGS.items():
    torch.manual_seed(0)
    model = get_peft_model(kit.loud(tiny.llama()), config)
    names = kit.filled(model)
    model.eval()
    with torch.no_grad():
        outputs = [kit.total(model(**kit.padded()))]
        outputs.append(kit.total(model.merge_and_unload()(**kit.padded())))
    results[method] = {"names": names, "outputs": outputs}
