"""New tokens: the embeddings grow, and only their rows are trained beside the LoRA."""

from peft import LoraConfig, PeftModel, get_peft_model

# the rest is the same under both packages
import tempfile

import torch
from torch import nn

from tests import tiny
from tests.peft import script_kit as kit


def grown() -> nn.Module:
    torch.manual_seed(0)
    model = kit.loud(tiny.llama())
    model.resize_token_embeddings(kit.VOCABULARY + 3, mean_resizing=False)
    return model  # type: ignore[no-any-return]


new = [kit.VOCABULARY, kit.VOCABULARY + 1, kit.VOCABULARY + 2]
config = LoraConfig(
    r=4,
    target_modules=["q_proj", "v_proj"],
    trainable_token_indices={"embed_tokens": new},
    task_type="CAUSAL_LM",
)
model = get_peft_model(grown(), config)
names = kit.filled(model)
ids = kit.ids(4, 8)
ids[:, 2] = torch.tensor([*new, 5])
losses = kit.trained(model.train(), [{"input_ids": ids, "labels": ids}], epochs=4)
model.eval()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(grown(), folder)
    outputs = [kit.total(each(input_ids=ids)) for each in (model, loaded)]
results = {"printed": kit.printed(model), "names": names, "losses": losses, "outputs": outputs}
