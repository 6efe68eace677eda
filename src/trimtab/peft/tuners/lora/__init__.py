"""``peft.tuners.lora``."""

from trimtab.peft.configs.lora import LoraConfig
from trimtab.peft.kinds import LoraModel
from trimtab.peft.layers import LoraConv as Conv2d
from trimtab.peft.layers import LoraEmbedding as Embedding
from trimtab.peft.layers import LoraLayer
from trimtab.peft.layers import LoraLinear as Linear

__all__ = ["Conv2d", "Embedding", "Linear", "LoraConfig", "LoraLayer", "LoraModel"]
