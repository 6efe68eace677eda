"""What each method can do, found by doing it on tiny models; and ``docs/methods.md``, made of what was found.

    python -m tests.laws.capabilities             says where the committed list differs from what is found
    python -m tests.laws.capabilities --write     writes the list and the page

The list, ``capabilities.json``, holds the cells that do not work, each with its reason; every other cell must work.
A cell that is new in it starts with the words of its error: read them, and write the mathematical reason.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

import trimtab as tt
from tests.laws.cells import SMALL, Cell, attached, registered, shaken
from tests.tiny import CASES, output, pick
from trimtab.adapt.contract import Method, Place
from trimtab.adapt.export import exported
from trimtab.adapt.merge import check_mergeable
from trimtab.adapt.parse import method_from
from trimtab.errors import NotMergeableError, TrimtabError, UnsupportedError

LIST = Path(__file__).with_name("capabilities.json")
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"

Refusals = dict[str, dict[str, str]]
"""Method -> capability -> why it cannot be."""


class Elsewhere(TrimtabError):
    """The method is attached, but not to the layer that was asked for: it chooses its own places."""


class Unmerged(TrimtabError):
    """The method acts there, but no layer of that kind can hold what it would merge into."""


# -- doing it -----------------------------------------------------------------------------------------


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


@torch.no_grad()
def act(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return output(model, inputs)


def merge(method: str, folder: Path) -> None:
    """merge ≡ forward."""
    case = CASES["llama"]
    model, inputs = case.model(), case.inputs()
    attached(Cell(method, "llama"), model)
    assert close(act(tt.merge(model, "a"), inputs), act(model, inputs), 1e-5)


def mixed_batch(method: str, folder: Path) -> None:
    """A row among others, of other adapters and of the base, ≡ the row alone."""
    case = CASES["llama"]
    model, inputs = case.model(), case.inputs()
    attached(Cell(method, "llama"), model)
    attached(Cell("lora", "llama"), model, "b", seed=2)
    names = ["a", None, "b", "a"]
    with tt.rows(model, names):
        together = act(model, inputs)
    assert not close(together[0], act(model, inputs)[1], 1e-6)
    for row, name in enumerate(names):
        with tt.using(model, name):
            assert close(together[row], act(model, pick(inputs, [row]))[0])


def together(method: str, folder: Path) -> None:
    """Gradients of a batch that another adapter shares ≡ gradients of the rows alone."""
    case = CASES["llama"]
    model, inputs = case.model(), case.inputs()
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100  # where a gate may look
    inputs["labels"] = labels
    mine = attached(Cell(method, "llama"), model)
    attached(Cell("lora", "llama"), model, "b", seed=2)

    def gradients(rows: Sequence[int], who: Any) -> dict[str, Tensor | None]:
        for parameter in model.parameters():
            parameter.grad = None
        with who:
            out = output(model, pick(inputs, list(rows))).flatten(1)
            (out * torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)).tanh().sum(
                1
            ).sum().backward()
        return {key: p.grad for key, p in mine.tensors.items()}

    mixed = gradients(range(4), tt.rows(model, ["a", "b", None, "a"]))
    alone = gradients((0, 3), tt.using(model, "a"))
    assert any(gradient is not None and gradient.any() for gradient in alone.values())
    for key, gradient in alone.items():
        other = mixed[key]
        assert (gradient is None) == (other is None), key
        assert gradient is None or other is None or close(gradient, other, 1e-6), key


class Hidden(nn.Module):
    """A linear layer that shows its sizes and not its weight."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.register_buffer("codes", dense.weight.detach().T * 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes / 8)


def hiding_base(method: str, folder: Path) -> None:
    """On a base whose linear layers hide their weights it is what it is on the plain base, and merges too."""
    case = CASES["llama"]
    plain, hiding, inputs = case.model(), case.model(), case.inputs()
    for block in hiding.model.layers:
        for module in list(block.modules()):
            for name, child in module._modules.items():
                if isinstance(child, nn.Linear):
                    module._modules[name] = Hidden(child).train(child.training)
    ours = attached(Cell(method, "llama"), plain)
    tt.attach(hiding, Cell(method, "llama").value(), "a")
    fresh = tt.detach(hiding, "a")
    for key, tensor in fresh.tensors.items():
        assert tensor.shape == ours.tensors[key].shape
        tensor.copy_(ours.tensors[key])
    tt.attach(hiding, fresh)
    expected = act(plain, inputs)
    assert close(act(hiding, inputs), expected, 1e-6)
    if merges(hiding):
        assert close(act(tt.merge(hiding, "a"), inputs), expected, 1e-5)


def merges(model: nn.Module) -> bool:
    from trimtab.adapt.bank import bank_of

    try:
        check_mergeable(bank_of(model), ("a",))
    except NotMergeableError:
        return False
    return True


LAYERS = {
    "linear": (("mixed", "head"), ("llama", "model.layers.0.mlp.down_proj")),
    "embedding": (("mixed", "embed"), ("llama", "model.embed_tokens")),
    "convolution": (("mixed", "conv1"), ("mixed", "conv2"), ("mixed", "conv3")),
    "norm": (("mixed", "norm"), ("llama", "model.layers.0.input_layernorm")),
    "experts": (("mixtral", "model.layers.0.mlp.experts.gate_up_proj"),),
    "attention": (("llama", "model.layers.0.self_attn"),),
    "sub-layer": (("llama", "model.layers.0.mlp"),),
}
"""Where each kind of layer lies; one of the places must do. An attention, inside it or at its output."""


def on_layer(places: Sequence[tuple[str, str]]) -> Callable[[str, Path], None]:
    """A check that a method acts at one of these places, and merges there if it merges."""

    def check(method: str, folder: Path) -> None:
        refused: TrimtabError | None = None
        for model, path in places:
            try:
                at_place(method, model, path)
                return
            except Unmerged:
                raise
            except TrimtabError as error:
                refused = error
        assert refused is not None
        raise refused

    return check


def at_place(method: str, name: str, path: str) -> None:
    case = CASES[name]
    model, inputs = case.model(), case.inputs()
    base = act(model, inputs)
    adapter = shaken(tt.attach(model, aimed(Cell(method, name).value(), path), "a"))
    if not any(f"{site.path}.".startswith(f"{path}.") for site in adapter.sites):
        raise Elsewhere(f"it acts at {adapter.sites[0].path!r} whatever it is told.")
    changed = act(model, inputs)
    assert not close(changed, base, 1e-7)
    if merges(model):
        try:
            merged = tt.merge(model, "a")
        except NotMergeableError as error:
            raise Unmerged(str(error)) from error
        assert close(act(merged, inputs), changed, 1e-5)


def aimed(method: Method, path: str) -> Method:
    """The method, or those inside it, at one path."""
    nested: dict[str, Any] = {}
    for name, value in method:
        if isinstance(value, Method):
            nested[name] = aimed(value, path)
        elif isinstance(value, tuple) and any(isinstance(part, Method) for part in value):
            nested[name] = tuple(aimed(part, path) for part in value)
    return method.replace(**nested) if nested else method.aimed([Place(path)])


def peft_reads(method: str, folder: Path) -> None:
    """PEFT reads our folder, and computes the same."""
    ours, theirs = both(method, folder)
    assert close(ours, theirs, 1e-4)


def reads_peft(method: str, folder: Path) -> None:
    """We read what PEFT writes, and compute the same."""
    ours, _ = both(method, folder)
    model = CASES["llama"].model(torch.float32)
    tt.attach(model, tt.Adapter.load(folder / "theirs"), "a")
    assert close(act(model, masked()), ours, 1e-5)


FOR_PEFT = {"boft": "boft(block=4)"}
"""Settings of methods whose usual ones PEFT cannot run here: several factors of BOFT need its CUDA extension."""


def both(method: str, folder: Path) -> tuple[Tensor, Tensor]:
    """(our outputs, PEFT's) of one adapter, saved by us, read and saved by PEFT."""
    model = CASES["llama"].model(torch.float32)
    setting = method_from(FOR_PEFT.get(method) or Cell(method, "llama").value())
    adapter = exported(shaken(tt.attach(model, setting, "a")))
    adapter.save(folder / "ours")
    if not adapter.origin.in_peft:
        raise UnsupportedError("PEFT has no such method.")
    inputs = masked()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(
            CASES["llama"].model(torch.float32), folder / "ours"
        ).eval()
        theirs.save_pretrained(folder / "theirs")
        length = inputs["input_ids"].shape[1]
        return act(model, inputs), act(theirs, inputs)[:, -length:]


def masked() -> dict[str, Tensor]:
    inputs = CASES["llama"].inputs()
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


CAPABILITIES: Mapping[str, Callable[[str, Path], None]] = {
    "merge": merge,
    "mixed batch": mixed_batch,
    "trained together": together,
    "weight-hiding base": hiding_base,
    **{kind: on_layer(places) for kind, places in LAYERS.items()},
    "PEFT reads ours": peft_reads,
    "reads PEFT's": reads_peft,
}


def refusals(method: str) -> dict[str, str]:
    """The capabilities that a method lacks, in the words of its errors.

    Raises:
        AssertionError: one of them computes something else than it should.
    """
    found: dict[str, str] = {}
    for capability, check in CAPABILITIES.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(method, Path(folder))
            except Unmerged as error:
                found[f"{capability}{UNMERGED}"] = str(error)
            except TrimtabError as error:
                found[capability] = reason(method, capability, str(error))
            except Exception as error:
                raise AssertionError(f"{method}, {capability}: {error!r}") from error
    return found


UNMERGED = " (merge)"
"""After the name of a kind of layer: it acts there, but cannot merge there."""


def reason(method: str, capability: str, words: str) -> str:
    """The first words for a new refusal: those of the class, or of the error."""
    if capability == "merge":
        return method_from(SMALL.get(method, method)).unmergeable
    if "is not a layer with a weight" in words:
        return "it changes a weight, and a sub-layer has none of its own: name the layers inside it"
    return words.partition(". ")[0].rstrip(".")


# -- the committed list -------------------------------------------------------------------------------


def committed() -> Refusals:
    listed: Refusals = json.loads(LIST.read_text(encoding="utf-8"))
    return listed


def updated(listed: Refusals, found: Refusals) -> Refusals:
    """The list as it must be: what is listed and still refused keeps its reason."""
    return {
        method: {name: listed.get(method, {}).get(name, words) for name, words in cells.items()}
        for method, cells in sorted(found.items())
        if cells
    }


def main() -> None:
    from tests.laws.methods_page import page

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="Write the list and docs/methods.md.")
    write = parser.parse_args().write
    listed = committed() if LIST.exists() else {}
    new = updated(listed, {method: refusals(method) for method in registered()})
    for method in sorted(listed.keys() | new.keys()):
        before, after = listed.get(method, {}), new.get(method, {})
        for name in sorted(before.keys() ^ after.keys()):
            state = f"refused: {after[name]}" if name in after else "works now"
            print(f"{method}, {name}: {state}")  # noqa: T201
    if write:
        LIST.write_text(json.dumps(new, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(page(new), encoding="utf-8")


if __name__ == "__main__":
    main()
