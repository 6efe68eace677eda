"""What must be refused: with a typed error that says what and where, and with nothing changed."""

from __future__ import annotations

import errno
import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import trimtab as tt
from tests import tiny as models
from tests.laws.cells import shaken
from tests.tiny import output
from trimtab.adapt import disk, files
from trimtab.adapt.files import CONFIG, OURS, WEIGHTS
from trimtab.adapt.lowrank import LowRank
from trimtab.adapt.probe import bare_state
from trimtab.errors import (
    AttachError,
    BaseMismatchError,
    ConfigError,
    DuplicateNameError,
    FileFormatError,
    RouteError,
    StorageError,
    TargetError,
    UnknownNameError,
    UnsupportedError,
)

IDS = torch.arange(3, 11).reshape(2, 4)


@pytest.fixture
def model() -> nn.Module:
    return models.llama()


def look(model: nn.Module) -> tuple[Any, ...]:
    """All that a failed call must leave alone."""
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    names = [(name, type(module)) for name, module in model.named_modules()]
    return names, hooks, [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()]


# -- methods and options ------------------------------------------------------------------------------


def test_an_unknown_method_suggests_a_known_one(model: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown method 'lorra'\. Did you mean 'lora'"):
        tt.attach(model, "lorra(rank=4)")


def test_an_unknown_option_suggests_a_known_one(model: nn.Module) -> None:
    """S6."""
    for make in (
        lambda: tt.LoRA(rnk=4),
        lambda: tt.method("lora(rnk=4)"),
        lambda: tt.attach(model, {"kind": "lora", "rnk": 4}),
    ):
        with pytest.raises(UnknownNameError, match="unknown option 'rnk'.*'rank'"):
            make()


def test_options_of_the_wrong_kind_are_refused() -> None:
    for text in ("lora(rank=0)", "lora(rank='many')", "lora(dropout=1.0)", "lora(bias='some')"):
        with pytest.raises(ConfigError, match="method lora"):
            tt.method(text)
    with pytest.raises(ConfigError, match="every rank must be at least 1"):
        tt.LoRA(rank_pattern={"q_proj": 0})


def test_unreadable_method_texts_are_refused() -> None:
    for text in ("lora(", "lora(8)", "lora(rank=x+1)", "lora(**{})", "", "lora rank=8"):
        with pytest.raises(ConfigError, match="method"):
            tt.method(text)
    with pytest.raises(ConfigError, match="needs a 'kind'"):
        tt.attach(models.llama(), {"rank": 4})


def test_a_method_that_does_not_suit_the_layer_says_why(model: nn.Module) -> None:
    for method, reason in (
        ("lora(targets='norms')", "no low-rank factors"),
        ("lora(targets='mlp_output')", "target the layers inside"),
        ("bitfit(targets='mlp_output')", "without a weight"),
        ("ia3(targets='keys', feedforward='embed_tokens')", "token ids have no size"),
        ("lora(targets='q_proj', bias='lora_only', train=['embed_tokens', 'q_proj'])", "both"),
    ):
        before = look(model)
        with pytest.raises((TargetError, UnsupportedError), match=reason):
            tt.attach(model, method)
        assert look(model) == before, method


# -- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.b", "", "a b", "a/b", "ünï"])
def test_a_name_that_cannot_be_part_of_a_key_is_refused(model: nn.Module, name: str) -> None:
    with pytest.raises(AttachError, match="use letters, digits"):
        tt.attach(model, "lora", name or " ")


@pytest.mark.parametrize(
    "name", ["forward", "train", "parameters", "training", "_modules", "requires_grad_", "__init__"]
)
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_name_that_is_an_attribute_of_modules_is_refused(
    model: nn.Module, method: str, name: str
) -> None:
    before = look(model)
    with pytest.raises(AttachError, match=f"choose another, for example '{name}-adapter'"):
        tt.attach(model, method, name)
    assert look(model) == before


@pytest.mark.parametrize(
    "method", ["lora(rank=2)", "ia3", "bottleneck(size=4)", "prefix(length=2)"]
)
@pytest.mark.parametrize(
    "name", ["layers", "self_attn", "model", "lm_head", "trimtab", "base_layer", "weight", "lora_A", "0"]
)  # fmt: skip
def test_an_adapter_named_like_a_module_works(
    model: nn.Module, method: str, name: str, tmp_path: Path
) -> None:
    """S8: PEFT writes an empty file, silently."""
    other = shaken(tt.attach(model, method, "other"), seed=2)
    adapter = shaken(tt.attach(model, method, name))
    keys = model.state_dict().keys()
    assert len(adapter.tensors) == len(other.tensors) > 0
    adapter.save(tmp_path / "a")
    assert len(load_file(tmp_path / "a" / WEIGHTS)) == len(adapter.tensors)
    with torch.no_grad(), tt.using(model, name):
        expected = output(model, {"input_ids": IDS})
    fresh = models.llama()
    assert fresh.state_dict().keys() < keys
    tt.attach(fresh, tt.Adapter.load(tmp_path / "a"))
    with torch.no_grad():
        assert torch.equal(output(fresh, {"input_ids": IDS}), expected)
    tt.detach(model, "other")
    assert tt.detach(model, name) == tt.Adapter.load(tmp_path / "a")


def test_a_name_that_is_taken_is_refused(model: nn.Module) -> None:
    """S7: PEFT keeps the old configuration with the new weights."""
    first = tt.attach(model, "lora(rank=2)", "a")
    before = look(model)
    for method in ("lora(rank=4)", "ia3", first.detached()):
        with pytest.raises(DuplicateNameError, match="'a' is attached already; detach it first"):
            tt.attach(model, method, "a")
    assert look(model) == before and first.method == tt.LoRA(rank=2)


def test_names_that_are_not_attached_are_refused(model: nn.Module) -> None:
    tt.attach(model, "lora(rank=2)", "support")
    for call in (
        lambda: tt.using(model, "suport").__enter__(),
        lambda: tt.rows(model, ["support", "suport"]).__enter__(),
        lambda: tt.detach(model, "suport"),
        lambda: tt.merge(model, "suport"),
        lambda: tt.scale(model, "suport", 1.0),
        lambda: tt.enable(model, "suport"),
        lambda: tt.disable(model, "suport"),
        lambda: tt.stack(model, ["suport"]),
    ):
        with pytest.raises(UnknownNameError, match="no adapter 'suport'.*'support'"):
            call()
    with pytest.raises(UnknownNameError, match="Attached: support"):
        tt.detach(model, "xyz")


def test_a_model_without_adapters_says_so(model: nn.Module) -> None:
    with pytest.raises(AttachError, match="has no adapters; attach one first"):
        tt.detach(model, "a")


# -- who acts -----------------------------------------------------------------------------------------


def test_rows_wants_one_name_a_row(model: nn.Module) -> None:
    tt.attach(model, "lora(rank=2)", "a")
    with pytest.raises(RouteError, match="one name per row, not the text 'a'"):
        tt.rows(model, "a").__enter__()
    for owners in (["a"], ["a", None, "a"], []):
        with tt.rows(model, owners), pytest.raises(RouteError, match="the batch has 2 rows"):
            model(input_ids=IDS)
    with pytest.raises(RouteError, match="names an adapter twice"):
        tt.using(model, ["a", "a"]).__enter__()


def test_a_scale_must_be_a_finite_number(model: nn.Module) -> None:
    tt.attach(model, "lora(rank=2)", "a")
    for factor in (math.nan, math.inf, "1", None):
        with pytest.raises(ConfigError, match="must be a finite number"):
            tt.scale(model, "a", factor)
    tt.attach(model, "prefix(length=2)", "p")
    with pytest.raises(TargetError, match="no scaled form"):
        tt.scale(model, "p", 0.5)


def test_merging_inside_a_scope_is_refused(model: nn.Module) -> None:
    tt.attach(model, "lora(rank=2)", "a")
    with tt.using(model, None), pytest.raises(RouteError, match="leave using"):
        tt.merge(model, "a")


def test_a_part_or_a_wrapper_of_an_adapted_model_is_refused(model: nn.Module) -> None:
    tt.attach(model, "lora(rank=2)", "a")
    wrapper = nn.ModuleDict({"inner": model})
    with pytest.raises(AttachError, match="attach to the same module each time"):
        tt.attach(wrapper, "lora(rank=2)", "b")
    with pytest.raises(TargetError, match="not a wrapper around it"):
        tt.merge(wrapper, "a")
    with pytest.raises(AttachError, match="attach to the same module each time"):
        tt.attach(model.model, "lora(rank=2)", "b")


def test_the_model_itself_is_no_target() -> None:
    with pytest.raises((TargetError, AttachError), match="container module|no module"):
        tt.attach(nn.Linear(4, 4), "lora(targets='re:.*')")


def test_a_model_with_a_child_of_our_name_is_refused() -> None:
    model = nn.ModuleDict({"trimtab": nn.Linear(4, 4)})
    with pytest.raises(AttachError, match="has an attribute 'trimtab'"):
        tt.attach(model, "lora(targets='trimtab')")


def test_a_failure_half_way_leaves_the_model_as_it_was(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one that nobody foresaw."""
    from trimtab.adapt import slots

    tt.attach(model, "lora(rank=2)", "first")
    whole = slots.add
    left = 5

    def failing(*args: Any, **kwargs: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise MemoryError
        whole(*args, **kwargs)

    for method in ("lora(rank=2, targets='all-linear')", "prefix(length=2)", "ia3"):
        bare, before, left = models.llama(), look(model), 1 if "prefix" in method else 5
        unadapted = look(bare)
        monkeypatch.setattr(slots, "add", failing)
        with pytest.raises(MemoryError):
            tt.attach(model, method, "second")
        left = 1 if "prefix" in method else 5
        with pytest.raises(MemoryError):
            tt.attach(bare, method, "second")
        monkeypatch.setattr(slots, "add", whole)
        assert look(model) == before and look(bare) == unadapted, method
        tt.attach(model, method, "second")
        tt.detach(model, "second")
        assert look(model) == before


# -- another base -------------------------------------------------------------------------------------


def saved(model: nn.Module, folder: Path, method: Any = "lora(rank=2, targets='q_proj')") -> Path:
    return shaken(tt.attach(model, method, "a")).save(folder)


def test_an_adapter_for_another_architecture_is_refused(model: nn.Module, tmp_path: Path) -> None:
    folder = saved(model, tmp_path / "a")
    for other in (models.llama(num_hidden_layers=2), models.llama(vocab_size=98), models.gpt2()):
        before = look(other)
        for any_base in (False, True):
            with pytest.raises(BaseMismatchError, match="its architecture") as caught:
                tt.attach(other, tt.Adapter.load(folder), any_base=any_base)
            assert "any_base" not in str(caught.value)
        assert look(other) == before


def test_an_adapter_for_other_weights_is_refused_unless_asked(
    model: nn.Module, tmp_path: Path
) -> None:
    """S18."""
    folder = saved(model, tmp_path / "a")
    other = models.llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(BaseMismatchError, match=r"weights differ.*any_base=True"):
        tt.attach(other, tt.Adapter.load(folder))
    tt.attach(other, tt.Adapter.load(folder), any_base=True)


def test_another_dtype_of_the_same_weights_is_the_same_base(
    model: nn.Module, tmp_path: Path
) -> None:
    folder = saved(model, tmp_path / "a")
    for dtype in (torch.bfloat16, torch.float64):
        tt.attach(models.llama().to(dtype), tt.Adapter.load(folder))


def test_adapters_of_different_bases_do_not_add(model: nn.Module, tmp_path: Path) -> None:
    a = tt.Adapter.load(saved(model, tmp_path / "a"))
    b = tt.Adapter.load(saved(models.llama(vocab_size=98), tmp_path / "b"))
    with pytest.raises(BaseMismatchError, match="different bases"):
        tt.add([a, b], name="sum")


# -- files --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    return saved(model, tmp_path / "a")


def rewrite(file: Path, **changes: Any) -> None:
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, **changes}))


def test_what_is_no_adapter_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileFormatError, match="not an adapter folder"):
            tt.Adapter.load(path)
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(FileFormatError, match=f"has no {WEIGHTS}"):
        tt.Adapter.load(tmp_path)


def test_a_missing_key_and_an_extra_key_are_refused(folder: Path) -> None:
    """S5: PEFT drops extra keys without a word."""
    tensors = load_file(folder / WEIGHTS)
    first = next(iter(tensors))
    save_file({**tensors, "stowaway": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(FileFormatError, match="1 unexpected, e.g. 'stowaway'"):
        tt.Adapter.load(folder)
    save_file({k: t for k, t in tensors.items() if k != first}, folder / WEIGHTS)
    with pytest.raises(FileFormatError, match=f"1 missing, e.g. '{first}'"):
        tt.Adapter.load(folder)


@pytest.mark.parametrize("kept", [0, 4, 9, 100, -1])
def test_a_truncated_weights_file_is_refused(folder: Path, kept: int) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:kept])
    with pytest.raises(FileFormatError, match="torn or foreign"):
        tt.Adapter.load(folder)


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip", b"{}", bytes(64), b"\xff" * 64])
def test_a_foreign_weights_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(FileFormatError, match="torn or foreign"):
        tt.Adapter.load(folder)


def test_a_flipped_bit_is_noticed(folder: Path) -> None:
    whole = bytearray((folder / WEIGHTS).read_bytes())
    whole[-5] ^= 4
    (folder / WEIGHTS).write_bytes(whole)
    with pytest.raises(FileFormatError, match="does not match its checksum"):
        tt.Adapter.load(folder)


@pytest.mark.parametrize("name", [CONFIG, OURS])
@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff", '{"schema": 1}', "null"])
def test_a_broken_description_is_refused(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(FileFormatError, match=name):
        tt.Adapter.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"tensors": []},
        {"tensors": None},
        {"sites": [["a"]]},
        {"sites": [["a", "", "first"]]},
        {"sites": [["model.layers.0.self_attn.q_proj", "", 4]]},
        {"methods": []},
        {"methods": "lora"},
        {"base": {"architecture": "x"}},
        {"name": "a.b"},
        {"provenance": None},
    ],
    ids=str,
)
def test_a_description_with_wrong_parts_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    rewrite(folder / OURS, **changes)
    with pytest.raises(FileFormatError, match=OURS):
        tt.Adapter.load(folder)


def test_an_index_that_lacks_a_checksum_is_refused(folder: Path) -> None:
    index = json.loads((folder / OURS).read_text())["tensors"]
    rewrite(folder / OURS, tensors={key: {"path": "", "slot": "x"} for key in index})
    with pytest.raises(FileFormatError, match=OURS):
        tt.Adapter.load(folder)


def test_a_method_that_is_not_installed_is_named(folder: Path) -> None:
    rewrite(folder / OURS, methods=[{"kind": "lorra"}])
    with pytest.raises(UnknownNameError, match="unknown method 'lorra'.*'lora'"):
        tt.Adapter.load(folder)


def test_other_shapes_are_refused_before_anything_changes(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    ours = json.loads((folder / OURS).read_text())
    for key in tensors:
        tensors[key] = torch.zeros(3, 3)
        ours["tensors"][key]["sha256"] = disk.checksum(tensors[key])
    save_file(tensors, folder / WEIGHTS)
    rewrite(folder / OURS, tensors=ours["tensors"])
    fresh = models.llama()
    before = look(fresh)
    with pytest.raises(AttachError, match=r"has shape \(3, 3\), this model needs \(2, 32\)"):
        tt.attach(fresh, tt.Adapter.load(folder))
    assert look(fresh) == before


# -- the disk -----------------------------------------------------------------------------------------


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["save_file", "write_json", "_flush", "_swap"])
def test_a_full_disk_harms_nothing(
    model: nn.Module, folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tt.Adapter.load(folder)
    adapter = shaken(tt.detach(model, "a"))
    monkeypatch.setattr(disk if where.startswith("_") else files, where, full)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(StorageError, match="No space left on device.*intact") as caught:
            adapter.save(target)
        assert isinstance(caught.value, OSError)
    monkeypatch.undo()
    assert tt.Adapter.load(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["a"]


def test_a_disk_that_fills_up_while_writing_harms_nothing(tmp_path: Path) -> None:
    """The real thing: the system lets no file grow beyond 4 KiB, which is in the middle of the weights."""
    model = models.llama()
    tt.attach(model, "lora(rank=2, targets='q_proj')", "a").save(tmp_path / "a")
    before = tt.Adapter.load(tmp_path / "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match="could not write.*intact"):
            tt.attach(model, "lora(rank=16)", "b").save(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tt.Adapter.load(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_saved_files_have_the_permissions_of_an_ordinary_write(
    model: nn.Module, tmp_path: Path
) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    (ordinary / "file").write_text("x")
    saved = tt.attach(model, "lora(rank=2)", "b").save(tmp_path / "b")
    assert saved.stat().st_mode == ordinary.stat().st_mode
    assert {file.stat().st_mode for file in saved.iterdir()} == {(ordinary / "file").stat().st_mode}


def test_a_folder_within_a_saved_folder_can_be_entered(tmp_path: Path) -> None:
    """As a training state's adapter."""
    with disk.replacing(tmp_path / "state") as temporary:
        (temporary / "adapter").mkdir()
        before = (temporary / "adapter").stat().st_mode
    assert (tmp_path / "state" / "adapter").stat().st_mode == before


def test_a_folder_of_something_else_is_not_overwritten(model: nn.Module, tmp_path: Path) -> None:
    adapter = tt.attach(model, "lora(rank=2)", "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for taken in (tmp_path / "notes", tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError):
            adapter.save(taken)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes"]


@pytest.mark.parametrize(
    ("kind", "reason"), [("lora", "registered as another class"), ("toy", "unknown method 'toy'")]
)
def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path, kind: str, reason: str) -> None:
    """A method that is no entry of the registry works in memory, but no process could load its files."""
    toy = type("Toy", (LowRank,), {"kind": kind, "__module__": __name__})
    adapter = tt.attach(models.llama(), toy(rank=2), "a")
    with pytest.raises(ConfigError, match=reason):
        adapter.save(tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_saving_again_replaces_the_folder_whole(model: nn.Module, folder: Path) -> None:
    (folder / "README.md").write_text("of the old adapter")
    adapter = tt.attach(model, "ia3", "b")
    adapter.save(folder)
    assert tt.Adapter.load(folder) == adapter
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG, OURS, WEIGHTS])


# -- methods that a base cannot hold ------------------------------------------------------------------


def test_nothing_was_trained_in_silence() -> None:
    """A layer that hides its weight has nothing to copy: full training must not train nothing."""
    from tests.adapt.test_base_is_immutable import Int8Linear

    model = nn.Sequential(Int8Linear(nn.Linear(4, 4)))
    with pytest.raises(UnsupportedError, match="cannot be trained itself"):
        tt.attach(model, "full(targets='0')")
    assert bare_state(model).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "method", ["lora(rank=2, train=['embed_tokens'])", "lora(rank=2)|tokens(ids=[3])"]
)
def test_what_an_adapter_has_its_own_values_of_makes_no_other_base(method: str) -> None:
    """New rows of a grown vocabulary are drawn anew; an adapter that trains them does not miss the old ones."""
    adapter = tt.attach(models.llama(), method, "a").detached()
    other = models.llama()
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    tt.attach(other, adapter)
    plain = tt.attach(models.llama(), "lora(rank=2)", "a").detached()
    with torch.no_grad():
        moved = models.llama()
        moved.model.embed_tokens.weight.add_(1)
    with pytest.raises(BaseMismatchError, match="embed_tokens"):
        tt.attach(moved, plain)
