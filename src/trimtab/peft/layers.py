"""The layer classes that user code asks for with ``isinstance``: a site answers by the adapters it holds."""

from __future__ import annotations

from typing import Any

from trimtab.adapt.site import LayerSite, SiteBase


class LayerType(type):
    """A class that has no objects of its own: a site with adapters of a method, on a kind of layer, is one."""

    method: str
    kind: str

    def __instancecheck__(cls, thing: Any) -> bool:
        if not isinstance(thing, SiteBase):
            return False
        if cls.kind and not (isinstance(thing, LayerSite) and thing.layer.kind == cls.kind):
            return False
        edits = (edit for held in thing.edits.values() for edit in held)
        return any(edit.method.peft_type == cls.method for edit in edits)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{cls.__name__} is only asked for with isinstance; get_peft_model puts adapters into a model."
        )


def _layer(name: str, method: str, kind: str = "") -> LayerType:
    doc = f"A place with {method} adapters{f' on a layer of kind {kind!r}' if kind else ''}."
    return LayerType(
        name, (), {"method": method, "kind": kind, "__doc__": doc, "__module__": __name__}
    )


LoraLayer = _layer("LoraLayer", "LORA")
LoraLinear = _layer("Linear", "LORA", "linear")
LoraEmbedding = _layer("Embedding", "LORA", "embedding")
LoraConv = _layer("Conv", "LORA", "conv")
AdaLoraLayer = _layer("AdaLoraLayer", "ADALORA")
IA3Layer = _layer("IA3Layer", "IA3")
LoHaLayer = _layer("LoHaLayer", "LOHA")
LoKrLayer = _layer("LoKrLayer", "LOKR")
OFTLayer = _layer("OFTLayer", "OFT")
BOFTLayer = _layer("BOFTLayer", "BOFT")
VeraLayer = _layer("VeraLayer", "VERA")
HRALayer = _layer("HRALayer", "HRA")
