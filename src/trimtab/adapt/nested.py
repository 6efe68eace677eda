"""Factors of experts' parameters in PEFT's files, where the nesting of wrappers decides which parameter is meant.

    here   experts.gate_up_proj.lora_A.weight (E, R, I)      experts.gate_up_proj.lora_B.weight (E, O, R)
           experts.down_proj. …
    there  experts.base_layer.lora_A.weight   (E·R, I)       experts.base_layer.lora_B.weight   (O, R·E), E fastest
           experts.lora_A.weight, …                          the outermost is the module's last parameter

E experts, R rank, I inputs and O outputs of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trimtab.adapt.adapter import Adapter
from trimtab.errors import FileFormatError, UnsupportedError

ORDER = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of experts in the order in which transformers' modules have them."""
INNER = ".base_layer"
FACTORS = ("lora_A.weight", "lora_B.weight")


def experts_of(adapter: Adapter) -> list[str]:
    """Which of its sites are parameters of experts: those with a pair of factors for each."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in adapter.named().items():
        if name.slot in FACTORS and name.path.rpartition(".")[2] in ORDER and tensor.dim() == 3:
            found.setdefault(name.path, {})[name.slot] = tuple(tensor.shape)
    shapes = {path: [of[slot] for slot in FACTORS] for path, of in found.items() if len(of) == 2}
    return [path for path, (a, b) in shapes.items() if a[0] == b[0] and a[1] == b[2]]


def folded(
    tensors: Mapping[str, Tensor], root: str, paths: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by key as PEFT has them, and the parameters they are of; ``paths`` are those of experts' parameters."""
    stored = dict(tensors)
    by_module: dict[str, list[str]] = {}
    for path in paths:
        by_module.setdefault(path.rpartition(".")[0], []).append(path.rpartition(".")[2])
    for module, names in by_module.items():
        outermost_first = sorted(names, key=ORDER.index, reverse=True)
        for depth, name in enumerate(outermost_first):
            a, b = (stored.pop(f"{root}{module}.{name}.{factor}") for factor in FACTORS)
            place = f"{root}{module}{INNER * depth}"
            stored[f"{place}.{FACTORS[0]}"] = a.flatten(0, 1).contiguous()
            stored[f"{place}.{FACTORS[1]}"] = b.permute(1, 2, 0).flatten(1).contiguous()
    return stored, sorted(paths)


def unfolded(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The inverse, of a file whose config names ``target_parameters``.

    Raises:
        UnsupportedError: they are not parameters of experts as transformers has them.
        FileFormatError: the file has not one pair of factors for each.
    """
    names = sorted({str(name).rpartition(".")[2] for name in config["target_parameters"]})
    if not set(names) <= set(ORDER):
        raise UnsupportedError(
            f"{where}: target_parameters {names} are not the experts' parameters of a transformers model "
            f"({', '.join(ORDER)}), so the file does not tell which factors belong to which."
        )
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise UnsupportedError(
            f"{where}: rank_pattern or alpha_pattern beside target_parameters is not read."
        )
    found = dict(tensors)
    ending = f".experts.{FACTORS[0]}"
    for module in [key.removesuffix(f".{FACTORS[0]}") for key in tensors if key.endswith(ending)]:
        here = _names_at(config["target_parameters"], module)
        for depth, name in enumerate(sorted(here, key=ORDER.index, reverse=True)):
            place = f"{module}{INNER * depth}"
            pair = [found.pop(f"{place}.{factor}", None) for factor in FACTORS]
            if pair[0] is None or pair[1] is None or pair[0].shape[0] % int(config["r"]):
                raise FileFormatError(
                    f"{where}: {place!r} has no factors of rank {config['r']} for {name!r}, one of the "
                    "target_parameters."
                )
            a, b = pair[0], pair[1]
            experts = a.shape[0] // int(config["r"])
            found[f"{module}.{name}.{FACTORS[0]}"] = a.unflatten(0, (experts, -1)).contiguous()
            found[f"{module}.{name}.{FACTORS[1]}"] = (
                b.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()
            )
    return found


def _names_at(targets: Sequence[str], module: str) -> list[str]:
    """The parameters of this module that are targets."""
    ends = [str(target).rpartition(".") for target in targets]
    return [
        name
        for name in ORDER
        if any(
            name == last and (not head or f".{module}".endswith(f".{head}"))
            for head, _, last in ends
        )
    ]
