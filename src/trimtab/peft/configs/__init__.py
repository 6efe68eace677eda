"""PEFT's configurations, by family of methods. Importing any makes all of them known, to ``peft`` too."""

from trimtab.peft.config import CONFIGS
from trimtab.peft.configs import lora as lora
from trimtab.peft.kin import enter
from trimtab.peft.guest import Guest
from trimtab.peft.types import on_disk

for _type, _config in CONFIGS.items():
    enter(_type, _config, Guest, _config.prefix or f"{on_disk(_type).lower()}_")
