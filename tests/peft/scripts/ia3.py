"""(IA)³ on a T5-like model: the defaults, then named modules on a decoder, and merging."""

from peft import IA3Config, TaskType, get_peft_model

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
model = get_peft_model(
    kit.loud(tiny.t5()), IA3Config(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False)
)
names = kit.filled(model, scale=0.5)
batches = [{**kit.padded(4, 8, seed), "labels": kit.ids(4, 5, seed + 10)} for seed in range(3)]
losses = kit.trained(model.train(), batches)

config = IA3Config(
    task_type="CAUSAL_LM",
    target_modules=["k_proj", "v_proj", "down_proj"],
    feedforward_modules=["down_proj"],
)
decoder = get_peft_model(kit.loud(tiny.llama()), config)
decoder_names = kit.filled(decoder, scale=0.5)
with torch.no_grad():
    before = kit.total(decoder.eval()(**kit.padded()))
    merged = decoder.merge_and_unload()
    after = kit.total(merged(**kit.padded()))

results = {
    "printed": kit.printed(model),
    "names": [names, decoder_names],
    "losses": losses,
    "merged": [before, after],
    "plain": type(merged).__name__,
}
