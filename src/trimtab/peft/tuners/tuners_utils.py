"""What code asks models and layers about: ``isinstance(module, BaseTunerLayer)``."""

from trimtab.adapt.site import SiteBase as BaseTunerLayer
from trimtab.peft.tuner import Tuner as BaseTuner

__all__ = ["BaseTuner", "BaseTunerLayer"]
