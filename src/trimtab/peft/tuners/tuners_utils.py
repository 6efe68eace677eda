"""``peft.tuners.tuners_utils``: what every tuner and every adapted layer is."""

from trimtab.adapt.site import SiteBase as BaseTunerLayer
from trimtab.peft.tuner import Tuner as BaseTuner

__all__ = ["BaseTuner", "BaseTunerLayer"]
