"""Prefix tuning of decoders, with grouped queries and without; and of an encoder-decoder."""

from peft import PrefixTuningConfig, TaskType, get_peft_model

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
results = {}
for name, make in {"llama": tiny.llama, "gpt2": tiny.gpt2}.items():
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, inference_mode=False, num_virtual_tokens=4
    )
    model = get_peft_model(kit.loud(make()), config)
    shapes = kit.filled_by_shape(model)
    texts = [{**kit.padded(4, 8, seed), "labels": kit.ids(4, 8, seed)} for seed in range(3)]
    losses = kit.trained(model.train(), texts, lr=0.3)
    with torch.no_grad():
        generated = model.eval().generate(
            input_ids=kit.ids(2, 6), max_new_tokens=5, do_sample=False
        )
    results[name] = {
        "printed": kit.printed(model),
        "shapes": shapes,
        "losses": losses,
        "generated": generated.tolist(),
    }

config = PrefixTuningConfig(
    task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, num_virtual_tokens=5
)
model = get_peft_model(kit.loud(tiny.t5()), config)
batch = {**kit.padded(4, 8), "labels": kit.ids(4, 5, 10)}
losses = kit.trained(model.train(), [batch], lr=0.3, epochs=10)
results["t5"] = {"printed": kit.printed(model), "learns": losses[-1] < losses[0]}
