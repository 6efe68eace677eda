"""Trimtab: one frozen model, a thousand small adapters.

Names are imported when they are first used, so that ``import trimtab`` and the command line are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# These two packages share their name with a function of the public interface. A package binds itself
# in its parent once, when it is first imported; imported (empty) and unbound here, it leaves the name free.
for _package in ("methods", "train"):
    import_module(f"{__name__}.{_package}")
    del globals()[_package]

__version__ = "0.1.0"

_PLACES = {
    "Adapter": "trimtab.adapt.adapter",
    "Method": "trimtab.adapt.contract",
    "Stepper": "trimtab.adapt.stepper",
    "add": "trimtab.adapt.arithmetic",
    "attach": "trimtab.adapt.attach",
    "captured": "trimtab.adapt.checkpoint",
    "describe": "trimtab.adapt.describe",
    "detach": "trimtab.adapt.attach",
    "disable": "trimtab.adapt.acting",
    "drop_layers": "trimtab.adapt.acting",
    "enable": "trimtab.adapt.acting",
    "exported": "trimtab.adapt.export",
    "fused": "trimtab.adapt.fuse",
    "interpolate": "trimtab.adapt.arithmetic",
    "merge": "trimtab.adapt.merge",
    "merge_with_report": "trimtab.adapt.merge_report",
    "parameter_groups": "trimtab.optim.adam",
    "probe": "trimtab.adapt.probe",
    "repeat_blocks": "trimtab.adapt.repeat",
    "resolve": "trimtab.adapt.describe",
    "restore_blocks": "trimtab.adapt.repeat",
    "rows": "trimtab.adapt.acting",
    "scale": "trimtab.adapt.acting",
    "scaled": "trimtab.adapt.arithmetic",
    "settled": "trimtab.adapt.export",
    "stack": "trimtab.adapt.acting",
    "using": "trimtab.adapt.acting",
    "LoRA": "trimtab.methods.lora",
    "DoRA": "trimtab.methods.dora",
    "VeLoRA": "trimtab.methods.velora",
    "QALoRA": "trimtab.methods.qalora",
    "MonteCLoRA": "trimtab.methods.monteclora",
    "KaSA": "trimtab.methods.kasa",
    "BDLoRA": "trimtab.methods.bdlora",
    "AdaLoRA": "trimtab.methods.adalora",
    "Arrow": "trimtab.methods.arrow",
    "IA3": "trimtab.methods.ia3",
    "BitFit": "trimtab.methods.bitfit",
    "Bottleneck": "trimtab.methods.bottleneck",
    "LlamaAdapter": "trimtab.methods.llama_adapter",
    "PTuning": "trimtab.methods.ptuning",
    "LoHa": "trimtab.methods.loha",
    "LoKr": "trimtab.methods.lokr",
    "HiRA": "trimtab.methods.hira",
    "FourierFT": "trimtab.methods.fourierft",
    "VeRA": "trimtab.methods.vera",
    "RandLoRA": "trimtab.methods.randlora",
    "MoRA": "trimtab.methods.mora",
    "MiSS": "trimtab.methods.miss",
    "OFT": "trimtab.methods.oft",
    "BOFT": "trimtab.methods.boft",
    "HRA": "trimtab.methods.hra",
    "Norms": "trimtab.methods.norms",
    "Tokens": "trimtab.methods.tokens",
    "Piggyback": "trimtab.methods.piggyback",
    "DiffPruning": "trimtab.methods.diff",
    "Prefix": "trimtab.methods.prefix",
    "SHiRA": "trimtab.methods.shira",
    "Prompt": "trimtab.methods.prompt",
    "SpotTune": "trimtab.methods.spottune",
    "Full": "trimtab.methods.full",
    "AdapterPlus": "trimtab.methods.adapterplus",
    "Compacter": "trimtab.methods.compacter",
    "DiReFT": "trimtab.methods.direft",
    "Fusion": "trimtab.methods.fusion",
    "LoReFT": "trimtab.methods.loreft",
    "NoReFT": "trimtab.methods.noreft",
    "Parallel": "trimtab.methods.parallel",
    "Pfeiffer": "trimtab.methods.pfeiffer",
    "AdaFit": "trimtab.methods.adafit",
    "Gated": "trimtab.methods.gated",
    "Union": "trimtab.methods.union",
    "load": "trimtab.models.load",
    "train": "trimtab.train.api",
}

__all__ = ["__version__", "method", "methods", *_PLACES]


def methods() -> list[str]:
    """Names of all methods, from this package and from others."""
    from trimtab.adapt.parse import methods as registry

    return registry.names()


def method(text: str) -> Method:
    """A method from a string such as ``"lora(rank=8)"``."""
    from trimtab.adapt.parse import method_from

    return method_from(text)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from trimtab.adapt.acting import disable as disable
    from trimtab.adapt.acting import drop_layers as drop_layers
    from trimtab.adapt.acting import enable as enable
    from trimtab.adapt.acting import rows as rows
    from trimtab.adapt.acting import scale as scale
    from trimtab.adapt.acting import stack as stack
    from trimtab.adapt.acting import using as using
    from trimtab.adapt.adapter import Adapter as Adapter
    from trimtab.adapt.arithmetic import add as add
    from trimtab.adapt.arithmetic import interpolate as interpolate
    from trimtab.adapt.arithmetic import scaled as scaled
    from trimtab.adapt.attach import attach as attach
    from trimtab.adapt.attach import detach as detach
    from trimtab.adapt.checkpoint import captured as captured
    from trimtab.adapt.contract import Method as Method
    from trimtab.adapt.describe import describe as describe
    from trimtab.adapt.describe import resolve as resolve
    from trimtab.adapt.export import exported as exported
    from trimtab.adapt.export import settled as settled
    from trimtab.adapt.fuse import fused as fused
    from trimtab.adapt.merge import merge as merge
    from trimtab.adapt.merge_report import merge_with_report as merge_with_report
    from trimtab.adapt.probe import probe as probe
    from trimtab.adapt.repeat import repeat_blocks as repeat_blocks
    from trimtab.adapt.repeat import restore_blocks as restore_blocks
    from trimtab.adapt.stepper import Stepper as Stepper
    from trimtab.methods.adafit import AdaFit as AdaFit
    from trimtab.methods.adalora import AdaLoRA as AdaLoRA
    from trimtab.methods.adapterplus import AdapterPlus as AdapterPlus
    from trimtab.methods.arrow import Arrow as Arrow
    from trimtab.methods.bdlora import BDLoRA as BDLoRA
    from trimtab.methods.bitfit import BitFit as BitFit
    from trimtab.methods.boft import BOFT as BOFT
    from trimtab.methods.bottleneck import Bottleneck as Bottleneck
    from trimtab.methods.compacter import Compacter as Compacter
    from trimtab.methods.diff import DiffPruning as DiffPruning
    from trimtab.methods.direft import DiReFT as DiReFT
    from trimtab.methods.dora import DoRA as DoRA
    from trimtab.methods.fourierft import FourierFT as FourierFT
    from trimtab.methods.full import Full as Full
    from trimtab.methods.fusion import Fusion as Fusion
    from trimtab.methods.gated import Gated as Gated
    from trimtab.methods.hira import HiRA as HiRA
    from trimtab.methods.hra import HRA as HRA
    from trimtab.methods.ia3 import IA3 as IA3
    from trimtab.methods.kasa import KaSA as KaSA
    from trimtab.methods.llama_adapter import LlamaAdapter as LlamaAdapter
    from trimtab.methods.loha import LoHa as LoHa
    from trimtab.methods.lokr import LoKr as LoKr
    from trimtab.methods.lora import LoRA as LoRA
    from trimtab.methods.loreft import LoReFT as LoReFT
    from trimtab.methods.miss import MiSS as MiSS
    from trimtab.methods.monteclora import MonteCLoRA as MonteCLoRA
    from trimtab.methods.mora import MoRA as MoRA
    from trimtab.methods.noreft import NoReFT as NoReFT
    from trimtab.methods.norms import Norms as Norms
    from trimtab.methods.oft import OFT as OFT
    from trimtab.methods.parallel import Parallel as Parallel
    from trimtab.methods.pfeiffer import Pfeiffer as Pfeiffer
    from trimtab.methods.piggyback import Piggyback as Piggyback
    from trimtab.methods.prefix import Prefix as Prefix
    from trimtab.methods.prompt import Prompt as Prompt
    from trimtab.methods.ptuning import PTuning as PTuning
    from trimtab.methods.qalora import QALoRA as QALoRA
    from trimtab.methods.randlora import RandLoRA as RandLoRA
    from trimtab.methods.shira import SHiRA as SHiRA
    from trimtab.methods.spottune import SpotTune as SpotTune
    from trimtab.methods.tokens import Tokens as Tokens
    from trimtab.methods.union import Union as Union
    from trimtab.methods.velora import VeLoRA as VeLoRA
    from trimtab.methods.vera import VeRA as VeRA
    from trimtab.models.load import load as load
    from trimtab.optim.adam import parameter_groups as parameter_groups
    from trimtab.train.api import train as train
