"""Adapters in tiers: what comes up is what went down, who may stay, and what one broken folder does to others."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from tests.laws.cells import SMALL, registered
from trimtab.adapt.active import Hold, Waiting
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attached import Attached
from trimtab.adapt.fit import Forms
from trimtab.adapt.packed import Packed
from trimtab.adapt.sources import AdapterFolder, Source
from trimtab.adapt.tiers import Budgets, Tiers
from trimtab.adapt.tree import sites_of
from trimtab.errors import (
    AttachError,
    BaseMismatchError,
    ConfigError,
    DuplicateNameError,
    FileFormatError,
    StorageError,
    TrimtabError,
    UnknownNameError,
)

METHOD = "lora(rank=2, targets=['q_proj', 'v_proj'])"
LARGE = 1 << 30
IDS = torch.arange(3, 11)[None]


def llama(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return tiny.llama().to(dtype)


def trained(method: str, seed: int, model: nn.Module | None = None) -> Adapter:
    """An adapter whose values are its own, as training leaves them."""
    model = llama() if model is None else model
    adapter = tt.attach(model, method, f"a{seed}", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tt.detach(model, adapter.name)


def folders(root: Path, count: int, method: str = METHOD) -> list[Path]:
    return [trained(method, seed).save(root / f"a{seed}") for seed in range(count)]


def registry(
    model: nn.Module, *, active: int = LARGE, host: int = LARGE, home: Path | None = None
) -> Tiers:
    forms = Forms(model)

    def made(name: str, packed: Packed) -> Source:
        assert home is not None
        return AdapterFolder(home / name)

    budgets = Budgets(active=active, host=host)
    return Tiers(forms, Attached(model, forms), budgets, None if home is None else made)


def held(tiers: Tiers, name: str) -> Hold:
    """The adapter, however long its reading takes."""
    for _ in range(4):
        found = tiers.hold(name)
        if isinstance(found, Hold):
            return found
        assert found is Waiting.READING
        tiers.wait(10)
    raise AssertionError("it is never there")


def answer(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad(), tt.using(model, name):
        return model(IDS).logits


def size(method: str = METHOD) -> int:
    forms = Forms(llama())
    return forms.serving(trained(method, 0)).nbytes


# -- what comes up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", registered())
def test_a_serving_copy_answers_as_the_adapter(method: str) -> None:
    """Bit for bit: what it rounds, hooks round too."""
    adapter = trained(SMALL.get(method, method), 1)
    model = llama()
    bare = model(IDS).logits
    tt.attach(model, adapter, "whole")
    expected = answer(model, "whole")
    assert not torch.equal(expected, bare)
    forms = Forms(model)
    packed = forms.serving(adapter)
    tt.detach(model, "whole")
    Attached(model, forms).up("copy", packed)
    assert torch.equal(answer(model, "copy"), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    here = packed.adapter("x").named()
    assert {n: t.shape for n, t in here.items()} == {n: t.shape for n, t in adapter.named().items()}
    assert packed.nbytes < 16 * len(here) + sum(t.nbytes for t in here.values())


def test_linear_factors_wait_in_the_dtype_of_the_base() -> None:
    packed = Forms(llama()).serving(trained(METHOD, 0))
    values = packed.adapter("x").named().values()
    assert {t.dtype for t in values} == {torch.bfloat16}
    assert packed.piece.numel() == 2 * sum(t.numel() for t in values)
    assert len({t.untyped_storage().data_ptr() for t in values}) == 1


def test_equal_adapters_share_their_form() -> None:
    forms = Forms(llama())
    first, second = (forms.serving(trained(METHOD, seed)) for seed in (0, 1))
    other = forms.serving(trained("lora(rank=4, targets=['q_proj', 'v_proj'])", 2))
    assert first.form is second.form is not other.form
    assert not torch.equal(first.piece, second.piece)


def test_an_adapter_of_a_folder_answers_as_ever(tmp_path: Path) -> None:
    model = llama()
    tiers = registry(model)
    expected = {}
    for folder in folders(tmp_path, 3):
        tt.attach(model, Adapter.load(folder), "now")
        expected[folder.name] = answer(model, "now")
        tt.detach(model, "now")
        tiers.register(folder.name, AdapterFolder(folder))
        assert tiers.tier(folder.name) == "disk"
    for name, logits in expected.items():
        with held(tiers, name):
            assert tiers.tier(name) == "active"
            assert torch.equal(answer(model, name), logits)
    assert len(tiers) == 3 and tiers.host_bytes == 3 * size()
    assert tiers.active_bytes == 2 * tiers.host_bytes  # masters are in fp32


@pytest.mark.parametrize("method", ["prefix(length=3)", "dora(rank=2)", "shira(count=20)"])
def test_other_methods_come_from_disk_too(method: str, tmp_path: Path) -> None:
    model = llama()
    tiers = registry(model)
    (folder,) = folders(tmp_path, 1, method)
    tt.attach(model, Adapter.load(folder), "now")
    tiers.register("a0", AdapterFolder(folder))
    with held(tiers, "a0"):
        assert torch.equal(answer(model, "a0"), answer(model, "now"))


# -- who makes room -----------------------------------------------------------------------------------


def test_who_was_held_least_recently_makes_room(tmp_path: Path) -> None:
    model, one = llama(), size()
    tiers = registry(model, active=4 * one, host=3 * one)
    for folder in folders(tmp_path, 4):
        tiers.register(folder.name, AdapterFolder(folder))
    for name in ("a0", "a1", "a0", "a2"):
        held(tiers, name).release()
    assert [tiers.tier(f"a{n}") for n in range(4)] == ["active", "host", "active", "disk"]
    held(tiers, "a3").release()
    assert [tiers.tier(f"a{n}") for n in range(4)] == ["host", "disk", "active", "active"]
    assert tiers.active_bytes == 4 * one and tiers.host_bytes == 3 * one
    assert sorted(name for name in model.trimtab.adapters) == ["a2", "a3"]


def test_what_is_held_stays_and_others_wait(tmp_path: Path) -> None:
    model, one = llama(), size()
    tiers = registry(model, active=2 * one, host=2 * one)
    for folder in folders(tmp_path, 2):
        tiers.register(folder.name, AdapterFolder(folder))
    first = held(tiers, "a0")
    again = held(tiers, "a0")
    assert tiers.hold("a1") is Waiting.READING
    tiers.wait(10)
    assert tiers.hold("a1") is Waiting.FULL
    first.release()
    first.release()  # once is enough
    assert tiers.hold("a1") is Waiting.FULL and tiers.tier("a0") == "active"
    again.release()
    with held(tiers, "a1"):
        assert tiers.tier("a0") == "host"


def test_host_memory_full_of_what_is_up_is_waited_for(tmp_path: Path) -> None:
    model, one = llama(), size()
    tiers = registry(model, active=4 * one, host=one)
    for folder in folders(tmp_path, 2):
        tiers.register(folder.name, AdapterFolder(folder))
    hold = held(tiers, "a0")
    assert tiers.hold("a1") is Waiting.FULL
    hold.release()
    tiers.lower("a0")
    held(tiers, "a1").release()
    assert tiers.tier("a0") == "disk" and tiers.host_bytes == one


def test_nobody_else_is_put_out_for_what_does_not_fit_anyway(tmp_path: Path) -> None:
    model, one = llama(), size()
    tiers = registry(model, active=4 * one, host=9 * one)
    large = trained("lora(rank=4, targets=['q_proj', 'v_proj'])", 9)
    for folder in folders(tmp_path, 2):
        tiers.register(folder.name, AdapterFolder(folder))
    tiers.put(large)
    hold = held(tiers, "a0")
    held(tiers, "a1").release()
    assert tiers.hold("a9") is Waiting.FULL
    assert tiers.tier("a1") == "active"
    hold.release()
    held(tiers, "a9").release()
    assert tiers.tier("a0") == tiers.tier("a1") == "host"


def test_what_has_no_folder_leaves_memory_only_for_one(tmp_path: Path) -> None:
    model, one = llama(), size()
    adapters = [trained(METHOD, seed) for seed in range(3)]
    stuck = registry(model, active=2 * one, host=2 * one)
    for adapter in adapters[:2]:
        stuck.put(adapter)
    with pytest.raises(ConfigError, match="held, or has no folder to go to"):
        stuck.put(adapters[2])
    tiers = registry(model, active=2 * one, host=2 * one, home=tmp_path)
    for adapter in adapters:
        tiers.put(adapter)
    assert [tiers.tier(a.name) for a in adapters] == ["disk", "host", "host"]
    tt.attach(model, adapters[0], "whole")
    with held(tiers, "a0"):
        assert torch.equal(answer(model, "a0"), answer(model, "whole"))


def test_how_far_an_adapter_goes_is_not_forgotten_while_it_is_down() -> None:
    model = llama()
    tiers = registry(model)
    tiers.put(trained(METHOD, 0))
    held(tiers, "a0").release()
    tt.scale(model, "a0", 0.25)
    tt.drop_layers(model, "a0", 1)
    site = next(iter(sites_of(model).values()))
    site.set_scale("a0", 0.5)
    expected = answer(model, "a0")
    tiers.lower("a0")
    assert sites_of(model) == {}
    held(tiers, "a0").release()
    assert torch.equal(answer(model, "a0"), expected)
    tiers.forget("a0")
    tiers.put(trained(METHOD, 0))
    held(tiers, "a0").release()
    assert not torch.equal(answer(model, "a0"), expected)


def test_an_adapter_that_is_attached_is_taken_up_as_it_is() -> None:
    """Its masters, and what of it learns, come back."""
    model = llama()
    adapter = tt.attach(model, METHOD, "own")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape))
    next(adapter.parameters()).requires_grad_(False)
    kept = adapter.detached()
    tiers = registry(model)
    tiers.adopt("own")
    assert tiers.tier("own") == "active"
    tiers.lower("own")
    held(tiers, "own").release()
    again = model.trimtab.adapters["own"]
    assert again == kept and again is not adapter
    learns = [parameter.requires_grad for parameter in again.parameters()]
    assert not learns[0] and all(learns[1:])


def test_what_somebody_wrote_into_a_copy_stays_in_it(tmp_path: Path) -> None:
    model = llama()
    tiers = registry(model, home=tmp_path / "home")
    (folder,) = folders(tmp_path, 1)
    tiers.register("a0", AdapterFolder(folder))
    held(tiers, "a0").release()
    with torch.no_grad():
        next(model.trimtab.adapters["a0"].parameters()).mul_(3)
    written = model.trimtab.adapters["a0"].detached()
    for tier in ("host", "disk"):
        tiers.lower("a0", tier)
        held(tiers, "a0").release()
        assert model.trimtab.adapters["a0"] == written if tier == "host" else True
    assert tiers.tier("a0") == "active" and (tmp_path / "home" / "a0").is_dir()
    assert Adapter.load(folder) != written


# -- what goes wrong ----------------------------------------------------------------------------------


def _torn(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _missing(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _replaced(folder: Path) -> None:
    trained(METHOD, 7).save(folder)


def _other_options(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 2', '"lora_alpha": 4'))


@pytest.mark.parametrize("harm", [_torn, _missing, _replaced, _other_options])
def test_a_broken_folder_is_its_own_adapters_error(harm: object, tmp_path: Path) -> None:
    model = llama()
    tiers = registry(model)
    for folder in folders(tmp_path, 2):
        tiers.register(folder.name, AdapterFolder(folder))
    assert callable(harm)
    harm(tmp_path / "a0")
    assert tiers.hold("a0") is Waiting.READING and tiers.hold("a1") is Waiting.READING
    while "a1" not in tiers.wait(10):
        pass
    held(tiers, "a1").release()
    with pytest.raises(FileFormatError, match="a0 was changed since its adapter was registered"):
        tiers.hold("a0")
    assert 2 * tiers.host_bytes == tiers.active_bytes == 2 * size()
    if harm is _replaced:
        tiers.forget("a0")
        tiers.register("a0", AdapterFolder(tmp_path / "a0"))
        held(tiers, "a0").release()


def test_a_folder_that_is_torn_already_is_not_registered(tmp_path: Path) -> None:
    tiers = registry(llama())
    (folder,) = folders(tmp_path, 1)
    _torn(folder)
    with pytest.raises(FileFormatError):
        tiers.register("a0", AdapterFolder(folder))
    assert "a0" not in tiers


def test_a_file_that_is_torn_while_nobody_looks_is_noticed(tmp_path: Path) -> None:
    """The same size and time, other bytes: the header of the file no longer fits."""
    tiers = registry(llama())
    (folder,) = folders(tmp_path, 1)
    source = AdapterFolder(folder)
    tiers.register("a0", source)
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[:8] = b"\xff" * 8
    file.write_bytes(content)
    source.note()
    assert tiers.hold("a0") is Waiting.READING
    tiers.wait(10)
    with pytest.raises(FileFormatError, match="no whole safetensors file"):
        tiers.hold("a0")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    other = llama()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    (folder,) = folders(tmp_path, 1)
    with pytest.raises(BaseMismatchError):
        registry(other).register("a0", AdapterFolder(folder))


def test_names_and_sizes(tmp_path: Path) -> None:
    model, one = llama(), size()
    tiers = registry(model, active=2 * one, host=one)
    (folder,) = folders(tmp_path, 1)
    tiers.register("a0", AdapterFolder(folder))
    with pytest.raises(DuplicateNameError, match="'a0' is registered already"):
        tiers.register("a0", AdapterFolder(folder))
    with pytest.raises(UnknownNameError, match="Did you mean 'a0'"):
        tiers.hold("a00")
    with pytest.raises(ConfigError, match="where all may take"):
        tiers.put(trained("lora(rank=4, targets=['q_proj', 'v_proj'])", 9))
    hold = held(tiers, "a0")
    with pytest.raises(AttachError, match="in use"):
        tiers.lower("a0")
    hold.release()
    tiers.forget("a0")
    assert "a0" not in tiers and tiers.host_bytes == tiers.active_bytes == 0


def test_what_is_forgotten_while_it_is_read_is_gone(tmp_path: Path) -> None:
    tiers = registry(llama())
    (folder,) = folders(tmp_path, 1)
    tiers.register("a0", AdapterFolder(folder))
    assert tiers.hold("a0") is Waiting.READING
    tiers.forget("a0")
    assert tiers.wait(10) == [] and tiers.host_bytes == 0


def test_who_holds_one_keeps_it_when_its_name_is_anothers(tmp_path: Path) -> None:
    model = llama()
    tiers = registry(model)
    first, second = folders(tmp_path, 2)
    tiers.register("a", AdapterFolder(first))
    hold = held(tiers, "a")
    before = answer(model, "a")
    tiers.replace("a", AdapterFolder(second))
    assert tiers.hold("a") is Waiting.READING
    tiers.wait(10)
    assert tiers.hold("a") is Waiting.NAMED and tiers.tier("a") == "host"
    assert torch.equal(answer(model, "a"), before)
    hold.release()
    assert sites_of(model) == {}
    with held(tiers, "a"):
        assert not torch.equal(answer(model, "a"), before)
        tiers.forget("a")
        assert "a" in model.trimtab.adapters and tiers.host_bytes
    assert sites_of(model) == {} and tiers.host_bytes == tiers.active_bytes == len(tiers) == 0


def test_who_claims_one_finds_it_when_it_is_forgotten(tmp_path: Path) -> None:
    model, one = llama(), size()
    tiers = registry(model, active=2 * one, host=one)
    folder, other = folders(tmp_path, 2)
    tiers.register("a", AdapterFolder(folder))
    claim, second = tiers.claim("a"), tiers.claim("a")
    tiers.forget("a")
    tiers.register("a", AdapterFolder(other))
    assert claim.plain and claim.read() is Waiting.READING
    tiers.wait(10)
    assert claim.read() is None
    whole = Adapter.load(folder).named()
    copy = claim.adapter().named()
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in copy.items())
    hold = claim.hold()
    assert isinstance(hold, Hold) and claim.up and not claim.plain
    for release in (claim.release, hold.release):
        release()
        release()
        assert tiers.host_bytes == one
    second.release()
    assert tiers.host_bytes == 0
    held(tiers, "a").release()


def test_a_folder_that_is_torn_takes_nobodys_place(tmp_path: Path) -> None:
    tiers = registry(llama())
    folder, torn = folders(tmp_path, 2)
    tiers.register("a", AdapterFolder(folder))
    version = tiers.claim("a").version
    _torn(torn)
    with pytest.raises(FileFormatError):
        tiers.replace("a", AdapterFolder(torn))
    assert tiers.claim("a").version == version
    tiers.replace("a", AdapterFolder(folder))
    assert tiers.claim("a").version != version


def test_a_disk_that_refuses_loses_nothing(tmp_path: Path) -> None:
    model, one = llama(), size()
    (tmp_path / "a0").write_text("in the way")
    tiers = registry(model, active=2 * one, host=one, home=tmp_path)
    first, second = (trained(METHOD, seed) for seed in (0, 1))
    tiers.put(first)
    with pytest.raises(StorageError):
        tiers.put(second)
    assert tiers.tier("a0") == "host" and "a1" not in tiers
    held(tiers, "a0").release()


class Refusing(Source):
    """A folder whose adapter cannot be made of what was read."""

    files = ()

    def check(self, forms: Forms) -> Packed:
        return forms.serving(trained(METHOD, 0))

    def read(self):  # type: ignore[no-untyped-def]
        def refuse(forms: Forms) -> Packed:
            raise AttachError("no")

        return refuse

    def write(self, name: str, packed: Packed) -> None:
        raise AssertionError


def test_what_is_read_and_does_not_fit_is_that_adapters_error(tmp_path: Path) -> None:
    tiers = registry(llama())
    tiers.register("a0", Refusing(tmp_path))
    for _ in range(2):  # asking again tries again
        assert tiers.hold("a0") is Waiting.READING
        tiers.wait(10)
        with pytest.raises(TrimtabError, match="no"):
            tiers.hold("a0")
        assert tiers.host_bytes == 0


# -- what it costs ------------------------------------------------------------------------------------


def test_an_adapter_in_host_memory_is_few_objects() -> None:
    """Beside its values, which are bytes of torch's: what Python keeps of one more of them."""
    model = llama()
    tiers = registry(model)
    adapter = trained(METHOD, 0)

    def put(names: range) -> None:
        for number in names:
            tiers.put(adapter.detached(name=f"n{number}"))

    put(range(10))
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        put(range(10, 60))
        gc.collect()
        each = (tracemalloc.get_traced_memory()[0] - before) / 50
    finally:
        tracemalloc.stop()
    assert each < 4096


def test_a_registered_folder_is_few_objects(tmp_path: Path) -> None:
    tiers = registry(llama())
    (folder,) = folders(tmp_path, 1)
    tiers.register("first", AdapterFolder(folder))
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(30):
            tiers.register(f"n{number}", AdapterFolder(folder))
        gc.collect()
        each = (tracemalloc.get_traced_memory()[0] - before) / 30
    finally:
        tracemalloc.stop()
    assert each < 4096
