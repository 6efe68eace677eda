"""What a model with adapters looks like now, and what a method would do to a model, as plain text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import nn

from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.bank import find_bank
from trimtab.adapt.contract import Method, Spec
from trimtab.adapt.parse import method_from
from trimtab.adapt.plan import layer_at, planned
from trimtab.adapt.tensors import specs_of
from trimtab.adapt.tree import anatomy_of
from trimtab.frozen.lowbit import LowBit


def describe(model: nn.Module) -> str:
    """Sites, methods, parameters, and what acts now."""
    bank = find_bank(model)
    total = _base_count(model)
    lines = [f"{type(model).__name__}: {total:,} parameters in the base"]
    if bank is None:
        return lines[0] + "; no adapters attached"
    acting = bank.default.owners[0] if bank._scope is None else None
    for name, adapter in bank.adapters.items():
        scale = bank.scales.get(name, 1.0)
        notes = [] if scale == 1.0 else [f"scale {scale:g}"]
        notes += [f"not in the first {bank.dropped[name]} blocks"] if bank.dropped.get(name) else []
        notes += ["disabled"] if bank.off or name in bank.disabled else []
        lines.append(
            f"  {name}: {' + '.join(m.kind for m in adapter.methods)}, {adapter.count:,} parameters "
            f"({adapter.count / total:.3%}) at {len(adapter.sites)} sites{', ' + ', '.join(notes) if notes else ''}"
        )
        lines += [f"    {line}" for line in grouped(adapter)]
    if bank.stacked is not None:
        count, size = len(bank.stacked.slots), bank.stacked.nbytes
        lines.append(f"  in slots: {count} adapters, {size:,} bytes")
    if acting is not None:
        lines.append("  acting now: " + (" -> ".join(acting) if acting else "the bare base"))
    else:
        owners = bank._scope.acting if bank._scope else ()
        lines.append("  acting now: " + ", ".join("+".join(o) or "base" for o in owners))
    return "\n".join(lines)


def resolve(model: nn.Module, method: Method | str | Mapping[str, object]) -> str:
    """Where a method would act on this model, with shapes and parameter counts; nothing is changed."""
    chosen = method_from(method)
    adapter, specs = states(model, chosen)
    kinds = " + ".join(part.kind for part in chosen.members)
    head = f"{kinds}: {len(adapter.sites)} sites, {counted(adapter, specs):,} parameters"
    return "\n".join([head, *(f"  {line}" for line in grouped(adapter))])


Specs = Mapping[tuple[int, str], Mapping[str, Spec]]
"""What `trimtab.adapt.tensors.specs_of` gives."""


def states(model: nn.Module, method: Method) -> tuple[Adapter, Specs]:
    """The adapter, without tensors, that a method would be on this model, and the tensors that it states."""
    anatomy = anatomy_of(model)
    adapter = planned(model, method, "plan", anatomy)
    layers = {site.path: layer_at(anatomy, site.path) for site in adapter.sites}
    return adapter, specs_of(adapter, anatomy, layers)


def counted(adapter: Adapter, specs: Specs) -> int:
    """How many values are trained: not those that are fixed, or drawn again."""
    known = {
        TensorName(path, spec.name): spec for (_, path), of in specs.items() for spec in of.values()
    }
    trained = known.keys() - adapter.fixed_among(known)
    return sum(math.prod(known[name].shape) for name in trained if known[name].stored)


def grouped(adapter: Adapter) -> list[str]:
    """One line per kind of site: block numbers folded, with how many there are."""
    counts: dict[str, int] = {}
    for site in adapter.sites:
        folded = re.sub(r"\.\d+(?=\.|$)", ".*", site.path) + (
            f" [{site.role}]" if site.role else ""
        )
        counts[folded] = counts.get(folded, 0) + 1
    return [f"{count:>4} × {path}" for path, count in counts.items()]


def _base_count(model: nn.Module) -> int:
    modules = anatomy_of(model).modules.values()
    distinct = {id(p): p.numel() for m in modules for p in m._parameters.values() if p is not None}
    return sum(distinct.values()) + sum(m.weights for m in modules if isinstance(m, LowBit))
