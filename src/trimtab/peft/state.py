"""State dicts of adapters and of the bare base, with PEFT's keys.

An adapter's keys are those of its file (`trimtab.adapt.files`), below ``base_model.`` where the model is a `PeftModel`
and as the model itself names its modules where adapters were injected into it. What belongs to an adapter is known
by the adapter, never by a piece of a name, so that one may be called ``layers`` or ``lora``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.adapt import slots
from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.bank import bank_of
from trimtab.adapt.disk import read_tensors
from trimtab.adapt.files import WEIGHTS, disk_key, in_peft_form
from trimtab.adapt.fingerprint import fingerprint
from trimtab.adapt.nested import experts_of, folded, unfolded
from trimtab.adapt.plan import other_base
from trimtab.adapt.site import BASE
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import AttachError, ConfigError, FileFormatError, suggest
from trimtab.peft.encoded import has_encoder, prefix_of_peft, shared_form, without_encoder
from trimtab.peft.errors import PeftWarning
from trimtab.peft.find import tuner_of
from trimtab.peft.gathered import ROOTS, gathered
from trimtab.peft.hub import local_file
from trimtab.peft.names import adapter_keys


class LoadResult(NamedTuple):
    """What loading did not match. It is strict, so only tensors of another size that were let pass stand here."""

    missing_keys: list[str]
    unexpected_keys: list[str]


# -- adapters -----------------------------------------------------------------------------------------


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter, by the keys that they have in a file.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into; compiled or not (``unwrap_compiled`` is
            PEFT's and is not needed).
        state_dict: the model's state dict to take the values from, where they are gathered from shards.
        adapter_name: whose.
        save_embedding_layers: embeddings are never copied; see `check_embeddings`.

    Raises:
        AttachError, UnknownNameError: no such adapter.
        FileFormatError: ``state_dict`` lacks a tensor.
    """
    check_embeddings(save_embedding_layers)
    adapter = bank_of(model).require(adapter_name)
    root = _root(model)
    values = adapter.named() if state_dict is None else gathered(adapter, _owner(model), state_dict)
    if has_encoder(adapter):
        adapter = shared_form(adapter, values)
        values = adapter.named()
    state = {disk_key(adapter, n): tensor.detach() for n, tensor in values.items()}
    if (experts := experts_of(adapter)) and in_peft_form(adapter):
        state = folded(state, adapter.method.peft_root, experts)[0]
    return {_for(root, key): tensor for key, tensor in state.items()}


@torch.no_grad()
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Write tensors, by the keys of a file, into an adapter of a model. All of them, and no other.

    They are in the form that this adapter has in its file: PEFT's, wherever PEFT has the method in these places.

    Args:
        ignore_mismatched_sizes: leave a tensor as it is where the given one has another size, with a warning.
        low_cpu_mem_usage: PEFT's; tensors on the meta device are replaced in any case.

    Raises:
        FileFormatError: keys are missing or belong to nothing, or a size differs; nothing was changed.
    """
    adapter = bank_of(model).require(adapter_name)
    present = adapter.named()
    names = {_bare(disk_key(adapter, name)): name for name in present}
    given = _own_keys(adapter, peft_model_state_dict)
    if has_encoder(adapter) and (shared := without_encoder(adapter, given, _bare)) is not None:
        return _become(model, adapter.name, shared)
    given = prefix_of_peft(adapter, given)
    if (experts := experts_of(adapter)) and in_peft_form(adapter):
        options = {"target_parameters": experts, "r": dict(adapter.method)["rank"]}
        given = unfolded(options, given, f"the state dict for {adapter_name!r}")
    if any(key not in names for key in given):
        given = _without_copies(model, given, names)
    made = tuple(f".{slot}" for slot in adapter.method.rebuilt)  # PEFT leaves them to the base
    optional = {key for key in names if made and key.endswith(made) and key not in given}
    _same_keys(adapter_name, names.keys() - optional, given)
    fitted = {
        names[key]: _fitted(model, adapter, names[key].slot, value, present[names[key]])
        for key, value in given.items()
    }
    other = {n: t for n, t in fitted.items() if t.shape != present[n].shape}
    told = [f"{n.key} {tuple(t.shape)}, not {tuple(present[n].shape)}" for n, t in other.items()]
    if other and not ignore_mismatched_sizes:
        raise FileFormatError(
            f"adapter {adapter_name!r}: {len(other)} tensors have another size: {'; '.join(told[:3])}."
        )
    if other:
        warnings.warn(
            f"adapter {adapter_name!r}: {len(other)} tensors have another size and were left as they are: "
            f"{'; '.join(told[:3])}.",
            category=PeftWarning,
            stacklevel=2,
        )
    for name, value in fitted.items():
        if name not in other:
            _put(adapter, name, present[name], value)
    return LoadResult([disk_key(adapter, name) for name in other], [])


def load_peft_weights(
    model_id: str | Path,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    *,
    subfolder: str | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file, in a folder or on the hub.

    Args:
        device: where to; by default the CPU.
        key_mapping: regular expression -> what it is to become, on module paths; the first that matches acts.

    Raises:
        FileFormatError: there is no safetensors file there, or it is torn. Nothing is unpickled.
    """
    file = local_file(model_id, WEIGHTS, subfolder, **hub)
    tensors = read_tensors(file)
    if device is not None:
        tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
    return tensors if not key_mapping else _renamed(tensors, key_mapping)


def check_embeddings(given: bool | str) -> None:
    """Refuse to copy the base's embeddings into an adapter."""
    if given not in ("auto", False):
        raise ConfigError(
            "save_embedding_layers: embeddings are not copied into adapters; to train them, name them in "
            "modules_to_save."
        )


# -- the base -----------------------------------------------------------------------------------------


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors, by the names they have without adapters."""
    base = _owner(model)
    hidden = adapter_keys(base)
    return {key: tensor for key, tensor in base.state_dict().items() if key not in hidden}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Load the base's tensors, by the names they have without adapters; the adapters stay as they are.

    They belong to this base from then on.

    Raises:
        AttachError: merged weights stand in the place of the base's.
        RuntimeError: as ``load_state_dict`` of any module, for another size and, if ``strict``, other keys.
    """
    base = _owner(model)
    bank = bank_of(base)
    if bank.merged:
        raise AttachError(
            "merged weights stand in the place of the base's; call unmerge_adapter() first."
        )
    hidden = adapter_keys(base)
    foreign = [key for key in state_dict if key in hidden]
    if foreign:
        raise FileFormatError(
            f"{foreign[0]!r} is an adapter's tensor, not the base's; see set_peft_model_state_dict."
        )
    own = {key: tensor for key, tensor in base.state_dict().items() if key in hidden}
    found = base.load_state_dict({**state_dict, **own}, strict=strict)
    present = fingerprint(base, anatomy_of(base).modules)
    for adapter in bank.adapters.values():
        adapter.base = present
    return LoadResult(list(found.missing_keys), list(found.unexpected_keys))


# -- used by models and files -------------------------------------------------------------------------


@torch.no_grad()
def replace_tensors(present: Adapter, new: Adapter) -> bool:
    """Write another adapter's values into the parameters of an attached one; whether they are alike enough."""
    mine, theirs = present.named(), new.named()
    same_base = present.base is None or not other_base(new, present.base)
    if present.method != new.method or mine.keys() != theirs.keys() or not same_base:
        return False
    if any(mine[name].shape != theirs[name].shape for name in mine):
        return False
    for name, tensor in mine.items():
        _put(present, name, tensor, theirs[name])
    return True


# -- keys ---------------------------------------------------------------------------------------------


def _owner(model: nn.Module) -> nn.Module:
    """The model that adapters are attached to, inside whatever stands around it."""
    bank = bank_of(model)
    return next(m for m in model.modules() if any(child is bank for child in m._modules.values()))


def _root(model: nn.Module) -> bool:
    """Whether keys begin with ``base_model.``: whether there is a tuner around the model."""
    return tuner_of(model) is not None


def _bare(key: str) -> str:
    for root in ROOTS:
        if key.startswith(root):
            return key[len(root) :]
    return key


def _for(root: bool, key: str) -> str:
    return key if root else _bare(key)


def _own_keys(adapter: Adapter, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By bare keys, without what PEFT writes beside an adapter's own tensors; what a seed draws must be the same."""
    own: dict[str, Tensor] = {}
    drawn = {n.slot: h for n, h in adapter.held.items() if n not in adapter.named()}
    for key, value in given.items():
        leaf = key.rpartition(".")[2]
        if leaf in adapter.method.peft_drawn:
            for slot in [slot for slot in drawn if slot == leaf]:
                mine = slots.get(drawn[slot], slot, adapter.name)
                if not torch.equal(mine.float().cpu(), value.float().cpu().reshape(mine.shape)):
                    raise FileFormatError(
                        f"adapter {adapter.name!r}: {key!r} holds other numbers than those drawn here from the seed."
                    )
            continue
        bare = _bare(key)
        if bare in own:
            raise FileFormatError(f"adapter {adapter.name!r}: two keys mean {bare!r}.")
        own[bare] = value
    return own


def _without_copies(
    model: nn.Module, given: Mapping[str, Tensor], names: Mapping[str, TensorName]
) -> dict[str, Tensor]:
    """What is left without copies of the base's tensors (PEFT adds embeddings); they must be those of this base."""
    base = get_base_model_state_dict(model)
    left = {}
    for key, value in given.items():
        own = key.replace(f".{BASE}.", ".")
        if key in names or own not in base:
            left[key] = value
        elif not torch.equal(base[own].cpu(), value.to(base[own].dtype).cpu()):
            raise FileFormatError(
                f"{key!r} is another tensor than this base's {own!r}: the base was changed, or its vocabulary was "
                "resized. Load it into the base with set_base_model_state_dict(model, ..., strict=False) first."
            )
    return left


def _same_keys(name: str, expected: Iterable[str], given: Iterable[str]) -> None:
    wanted, found = set(expected), set(given)
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        parts = [f"{len(missing)} missing, e.g. {missing[0]!r}"] if missing else []
        hint = suggest(extra[0], missing or wanted) if extra else ""
        parts += (
            [f"{len(extra)} unexpected, e.g. {extra[0]!r}{hint and f' ({hint.strip()})'}"]
            if extra
            else []
        )
        raise FileFormatError(
            f"adapter {name!r}: these are not its tensors: {'; '.join(parts)}. Nothing was loaded."
        )


def _fitted(model: nn.Module, adapter: Adapter, slot: str, value: Tensor, mine: Tensor) -> Tensor:
    """A tensor as the method holds it, where PEFT's is another (a prompt of an encoder-decoder)."""
    tuner = tuner_of(model)
    if value.shape == mine.shape or tuner is None:
        return value
    return adapter.method.tensor_from_peft(tuner.peft_config[adapter.name].to_dict(), slot, value)


def _become(model: nn.Module, name: str, shared: Adapter) -> LoadResult:
    """Put a prompt in the place of an adapter that makes one by an encoder."""
    tuner = tuner_of(model)
    if tuner is None:
        raise FileFormatError(
            f"adapter {name!r} has an encoder, and these are the values of a prompt without one."
        )
    active = list(tuner.active_adapters)
    tuner.replace(name, tuner.peft_config[name], shared)
    tuner.set_adapter(active)
    warnings.warn(
        f"adapter {name!r} is the given prompt from now on, without the encoder that made it; an optimizer made before "
        "does not know its parameters.",
        category=PeftWarning,
        stacklevel=3,
    )
    return LoadResult([], [])


def _put(adapter: Adapter, name: TensorName, present: Tensor, value: Tensor) -> None:
    if present.device.type != "meta":
        present.copy_(value)
        return
    holder = adapter.held[name]
    slots.remove(holder, name.slot, adapter.name)
    new = value.detach().clone()
    if isinstance(present, nn.Parameter):
        new = nn.Parameter(new, requires_grad=present.requires_grad)
    slots.add(holder, name.slot, adapter.name, new)


def _renamed(tensors: Mapping[str, Tensor], mapping: Mapping[str, str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        root = next((root for root in ROOTS if key.startswith(root)), "")
        path = key[len(root) :]
        for pattern, new in mapping.items():
            path, times = re.subn(pattern, new, path)
            if times:
                break
        if root + path in renamed:
            raise FileFormatError(f"key_mapping makes two tensors {root + path!r}.")
        renamed[root + path] = tensor
    return renamed
