"""PEFT's configurations, by family of methods. Importing any makes all of them known, to ``peft`` too."""

from trimtab.peft.config import CONFIGS
from trimtab.peft.configs import adalora as adalora
from trimtab.peft.configs import lora as lora
from trimtab.peft.configs import ours as ours
from trimtab.peft.configs import prompts as prompts
from trimtab.peft.configs import rotations as rotations
from trimtab.peft.configs import scales as scales
from trimtab.peft.configs import weights as weights
from trimtab.peft.kin import enter
from trimtab.peft.tuner import Tuner
from trimtab.peft.types import on_disk

for _type, _config in CONFIGS.items():
    enter(_type, Tuner, _config.prefix or f"{on_disk(_type).lower()}_")
