"""P-tuning of a BERT-like classifier: a small network writes the virtual tokens."""

from peft import PromptEncoderConfig, get_peft_model

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
config = PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=6, encoder_hidden_size=24)
model = get_peft_model(kit.loud(tiny.bert()), config)
shapes = kit.filled_by_shape(model)
batches = [{**kit.padded(4, 8, seed), "labels": torch.tensor([0, 1, 2, seed])} for seed in range(3)]
losses = kit.trained(model.train(), batches, lr=0.1)
with torch.no_grad():
    logits = model.eval()(**batches[0]).logits

results = {
    "printed": kit.printed(model),
    "shapes": shapes,
    "losses": losses,
    "logits": kit.total(logits),
}
