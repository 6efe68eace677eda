"""PEFT's configurations, by family of methods. Importing any makes all of them known, to ``peft`` too.

Those of the methods that PEFT lacks (`trimtab.peft.configs.ours`) import these methods: they wait for their first use.
"""

from trimtab.peft.config import CONFIGS
from trimtab.peft.configs import adalora as adalora
from trimtab.peft.configs import lora as lora
from trimtab.peft.configs import prompts as prompts
from trimtab.peft.configs import rotations as rotations
from trimtab.peft.configs import scales as scales
from trimtab.peft.configs import weights as weights
from trimtab.peft.guest import Guest
from trimtab.peft.kin import enter
from trimtab.peft.types import on_disk


def make_known() -> None:
    """Put all configurations that there are into the tables of ``peft``."""
    for name, cls in CONFIGS.items():
        enter(name, Guest, cls.prefix or f"{on_disk(name).lower()}_")


make_known()
