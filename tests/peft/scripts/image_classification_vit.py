"""Pictures with a ViT-like model and no task type; the classifier is named in ``modules_to_save``."""

from peft import LoraConfig, PeftModel, get_peft_model

# the rest is the same under both packages
import tempfile

import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
config = LoraConfig(
    r=16,
    lora_alpha=16,
    target_modules=r".*\.(q_proj|query|v_proj|value)",  # the names differ between releases of transformers
    lora_dropout=0.0,
    bias="none",
    modules_to_save=["classifier"],
)
model = get_peft_model(kit.loud(tiny.vit()), config)
names = kit.filled(model)

generator = torch.Generator().manual_seed(0)
pictures = torch.randn(4, 3, 8, 8, generator=generator)
batches = [{"pixel_values": pictures, "labels": torch.tensor([0, 1, 2, 1])}]
losses = kit.trained(model.train(), batches, epochs=4)
with torch.no_grad():
    logits = model.eval()(pixel_values=pictures)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    inference_model = PeftModel.from_pretrained(kit.loud(tiny.vit()), folder)
with torch.no_grad():
    again = inference_model(pixel_values=pictures)

results = {
    "printed": kit.printed(model),
    "names": names,
    "losses": losses,
    "logits": kit.total(logits),
    "loaded": kit.total(again),
    "classes": logits.logits.argmax(-1).tolist(),
}
