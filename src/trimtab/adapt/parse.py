"""The registry of methods, and the three ways to write one: a value, a mapping, a string.

LoRA(rank=8)           {"kind": "lora", "rank": 8}         "lora(rank=8)"
LoRA() | Prefix()      [{"kind": "lora"}, "prefix"]        "lora|prefix"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimtab.adapt.contract import Method
from trimtab.config import name_and_options
from trimtab.errors import ConfigError
from trimtab.registry import Registry

METHODS = {
    "adalora": "trimtab.methods.adalora:AdaLoRA",
    "adapterplus": "trimtab.methods.adapterplus:AdapterPlus",
    "adafit": "trimtab.methods.adafit:AdaFit",
    "bdlora": "trimtab.methods.bdlora:BDLoRA",
    "arrow": "trimtab.methods.arrow:Arrow",
    "bitfit": "trimtab.methods.bitfit:BitFit",
    "bottleneck": "trimtab.methods.bottleneck:Bottleneck",
    "compacter": "trimtab.methods.compacter:Compacter",
    "direft": "trimtab.methods.direft:DiReFT",
    "dora": "trimtab.methods.dora:DoRA",
    "full": "trimtab.methods.full:Full",
    "fusion": "trimtab.methods.fusion:Fusion",
    "gated": "trimtab.methods.gated:Gated",
    "ia3": "trimtab.methods.ia3:IA3",
    "kasa": "trimtab.methods.kasa:KaSA",
    "loreft": "trimtab.methods.loreft:LoReFT",
    "lora": "trimtab.methods.lora:LoRA",
    "llama-adapter": "trimtab.methods.llama_adapter:LlamaAdapter",
    "loha": "trimtab.methods.loha:LoHa",
    "lokr": "trimtab.methods.lokr:LoKr",
    "hira": "trimtab.methods.hira:HiRA",
    "fourierft": "trimtab.methods.fourierft:FourierFT",
    "velora": "trimtab.methods.velora:VeLoRA",
    "vera": "trimtab.methods.vera:VeRA",
    "randlora": "trimtab.methods.randlora:RandLoRA",
    "monteclora": "trimtab.methods.monteclora:MonteCLoRA",
    "mora": "trimtab.methods.mora:MoRA",
    "miss": "trimtab.methods.miss:MiSS",
    "oft": "trimtab.methods.oft:OFT",
    "boft": "trimtab.methods.boft:BOFT",
    "hra": "trimtab.methods.hra:HRA",
    "norms": "trimtab.methods.norms:Norms",
    "tokens": "trimtab.methods.tokens:Tokens",
    "piggyback": "trimtab.methods.piggyback:Piggyback",
    "diff": "trimtab.methods.diff:DiffPruning",
    "noreft": "trimtab.methods.noreft:NoReFT",
    "parallel": "trimtab.methods.parallel:Parallel",
    "pfeiffer": "trimtab.methods.pfeiffer:Pfeiffer",
    "prefix": "trimtab.methods.prefix:Prefix",
    "shira": "trimtab.methods.shira:SHiRA",
    "prompt": "trimtab.methods.prompt:Prompt",
    "ptuning": "trimtab.methods.ptuning:PTuning",
    "qalora": "trimtab.methods.qalora:QALoRA",
    "spottune": "trimtab.methods.spottune:SpotTune",
    "union": "trimtab.methods.union:Union",
}
methods: Registry[type[Method]] = Registry("method", "trimtab.methods", METHODS)


def of_peft_type(kind: str) -> Iterator[type[Method]]:
    """The methods of one ``peft_type``. Those whose names are like it come first: all need not be imported."""
    squeezed = kind.lower().replace("_", "")
    for name in sorted(methods.names(), key=lambda name: (name not in squeezed, name)):
        if methods.get(name).peft_type == kind:
            yield methods.get(name)


PRESETS = {
    "fish": "shira(mask='fisher', share=0.005)",
    "magnitude": "shira(mask='magnitude')",
    "houlsby": "bottleneck(size=64, train=['norms'])",
    "scaled_parallel": "parallel(scaling='learned')",
    "compacter++": "compacter(targets=['mlp_output'], train=['norms'])",
    "p-tuning-v2": "prefix(length=128, init_std=1.0, dropout=0.1)",
    "mam": "prefix(length=30, hidden=800)|parallel(size=512)",
    "unipelt": (
        "gated(inner=lora(rank=8, alpha=2, targets=['queries', 'values']))|gated(inner=prefix(length=10))"
        "|gated(inner=bottleneck(size=48, targets='mlp_output'))"
    ),
    "adafilter": "adafit(reads='input', group_size=1)",
}
"""Settings that have a name of their own. Options are added to them: ``houlsby(size=8)``."""

Written = Method | Mapping[str, Any] | str
"""One method, in any of the three ways."""


def method_from(value: Written | Sequence[Written]) -> Method:
    """The method that a value, a mapping with ``kind``, or a string means; several of them are a union.

    Raises:
        UnknownNameError: no such method or option; the message suggests near ones.
        ConfigError: an option that does not validate, or a string that cannot be read.
    """
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        return _from_string(value)
    if isinstance(value, Sequence):
        several = [method_from(each) for each in value]
        return several[0] if len(several) == 1 else methods.get("union").parse({"parts": several})
    options = dict(value)
    if "kind" not in options:
        raise ConfigError("a method needs a 'kind', for example {'kind': 'lora', 'rank': 16}.")
    kind = str(options.pop("kind"))
    if kind in PRESETS:
        return _from_string(PRESETS[kind]).replace(**options)
    return methods.get(kind).parse(options, where=f"method {kind}")


def _from_string(text: str) -> Method:
    written = _alternatives(text)
    if len(written) > 1:
        if not all(map(str.strip, written)):
            raise ConfigError(f"method {text!r}: a method stands on each side of a bar.")
        return method_from(written)
    name, options = name_and_options(text, of="method")
    if name in PRESETS:
        preset = _from_string(PRESETS[name])
        return preset.replace(**options) if options else preset
    return methods.get(name).parse(options, where=f"method {name}")


def _alternatives(text: str) -> list[str]:
    """What stands between bars outside of parentheses, brackets and quotes."""
    found, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
            if character == "|" and depth == 0:
                found.append("")
                continue
        found[-1] += character
    return found
