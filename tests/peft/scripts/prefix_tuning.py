"""Prefix tuning of an encoder-decoder and of a decoder."""

from peft import PrefixTuningConfig, TaskType, get_peft_model

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
model = get_peft_model(
    kit.loud(tiny.t5()),
    PrefixTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, num_virtual_tokens=5),
)
shapes = kit.filled_by_shape(model)
batches = [{**kit.padded(4, 8, seed), "labels": kit.ids(4, 5, seed + 10)} for seed in range(2)]
losses = kit.trained(model.train(), batches, lr=0.3)
with torch.no_grad():
    generated = model.eval().generate(**kit.padded(2, 8), max_new_tokens=5)

decoder = get_peft_model(
    kit.loud(tiny.llama()), PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
)
kit.filled_by_shape(decoder)
texts = [{**kit.padded(4, 8, seed), "labels": kit.ids(4, 8, seed)} for seed in range(2)]
decoder_losses = kit.trained(decoder.train(), texts, lr=0.3)
with torch.no_grad():
    decoder_generated = decoder.eval().generate(
        input_ids=kit.ids(2, 6), max_new_tokens=5, do_sample=False
    )

results = {
    "printed": [kit.printed(model), kit.printed(decoder)],
    "shapes": shapes,
    "losses": [losses, decoder_losses],
    "generated": [generated.tolist(), decoder_generated.tolist()],
}
