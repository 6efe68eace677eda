"""Requests for adapters that are only registered: they come when there is room, and say what they say attached."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

import trimtab as tt
from tests import tiny
from tests.engine import kit
from tests.laws.cells import SMALL, registered
from trimtab.adapt.active import Hold
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.bank import find_bank
from trimtab.adapt.fit import Forms
from trimtab.adapt.packed import Packed
from trimtab.adapt.pool import BEGIN
from trimtab.adapt.sources import AdapterFolder, Read, Source
from trimtab.adapt.stack import Stack
from trimtab.adapt.tiers import Budgets
from trimtab.engine import Engine, SamplingParams
from trimtab.engine.desk import Desk
from trimtab.engine.serve import Loop, Request
from trimtab.errors import (
    AnswerError,
    AttachError,
    ConfigError,
    DuplicateNameError,
    FileFormatError,
    UnknownNameError,
)
from trimtab.methods.prefix import Prefix
from trimtab.models.load import Base
from trimtab.optim import AdamParams

GREEDY = SamplingParams(max_tokens=8, temperature=0)
SLOTS = {
    "lora": "lora(rank=2)",
    "rslora": "lora(rank=4, rslora=True)",
    "wide": "lora(rank=20, targets=['o_proj', 'down_proj'])",
}
NAMED = {"dora": "dora(rank=2)", "ia3": "ia3", "prefix": "prefix(length=3)", "prompt": "prompt(length=3)",
         "gated": "spottune(inner=lora(rank=2), hidden=4)"}  # fmt: skip
METHODS = SLOTS | NAMED
TEXT = [5, 9, 11, 70, 80]
MANY = 48


def made(base: Base, method: object, seed: int) -> Adapter:
    """An adapter with values of its own, attached to nothing."""
    tt.attach(base.model, method, "made", seed=seed)
    return moved(tt.detach(base.model, "made"), seed)


def moved(adapter: Adapter, seed: int) -> Adapter:
    """A copy with other values."""
    found, generator = adapter.detached(), torch.Generator().manual_seed(seed)
    for tensor in found.named().values():
        if tensor.is_floating_point():
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return found


def said(base: Base, adapter: Adapter, text: Sequence[int] = TEXT) -> tuple[int, ...]:
    """What an adapter answers that is attached alone."""
    tt.attach(base.model, adapter, "alone")
    (answer,) = Engine(base).sample([text], GREEDY, "alone")
    tt.detach(base.model, "alone")
    return answer.tokens


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of adapters of each method, and of many LoRAs."""
    base, root = kit.base(), tmp_path_factory.mktemp("adapters")
    for seed, (name, method) in enumerate(METHODS.items()):
        made(base, method, seed).save(root / name)
    kinds = [
        made(base, m, 1) for m in ("lora(rank=2)", "lora(rank=2)", "lora(rank=10)", "dora(rank=2)")
    ]
    for number in range(MANY):
        moved(kinds[number % len(kinds)], 100 + number).save(root / f"n{number}")
    return root


@pytest.fixture(scope="module")
def alone(home: Path) -> dict[str, tuple[int, ...]]:
    """What each says of `TEXT` by itself; the bare base under an empty name."""
    engine = Engine(kit.base())
    found = {"": engine.sample([TEXT], GREEDY)[0].tokens}
    for folder in home.iterdir():
        tt.attach(engine.model, Adapter.load(folder), folder.name)
        found[folder.name] = engine.sample([TEXT], GREEDY, folder.name)[0].tokens
        tt.detach(engine.model, folder.name)
    return found


def engine_of(home: Path, names: Iterable[str], base: Base | None = None, **budgets: int) -> Engine:
    engine = Engine(base or kit.base(), budgets=Budgets(**budgets))
    for name in names:
        engine.tiers.register(name, AdapterFolder(home / name))
    return engine


def asked(engine: Engine, *names: str | None, params: SamplingParams = GREEDY) -> list[Request]:
    return [engine.requests([TEXT], params, name)[0] for name in names]


def loop_of(engine: Engine) -> Loop:
    assert engine.answering.loop is not None
    return engine.answering.loop


def attached(engine: Engine) -> list[str]:
    bank = find_bank(engine.model)
    return [] if bank is None else list(bank.adapters)


def bytes_of(home: Path, *names: str) -> int:
    """What these take in host memory together."""
    engine = engine_of(home, ())
    for name in names:
        engine.tiers.put(Adapter.load(home / name).detached(name=name))
    return engine.tiers.host_bytes


def slot_bytes(home: Path, name: str) -> int:
    """What a slot takes."""
    stack = Stack(kit.llama())
    stack.put(Adapter.load(home / name))
    return stack.nbytes // BEGIN


# -- what they say -------------------------------------------------------------------------------------


def test_every_method_says_what_it_says_attached(tmp_path: Path) -> None:
    base = kit.base(kit.llama(dtype=torch.float64))
    alone, first = {}, Engine(base)
    for seed, method in enumerate(registered()):
        adapter = tt.attach(base.model, made(base, SMALL.get(method, method), seed), "alone")
        alone[method] = first.sample([TEXT], GREEDY, "alone")[0].tokens
        tt.detach(base.model, "alone")
        adapter.save(tmp_path / method)
    engine = engine_of(tmp_path, alone, base)
    answers = engine.sample([TEXT] * len(alone), GREEDY, list(alone))
    assert {name: one.tokens for name, one in zip(alone, answers, strict=True)} == alone
    assert len(set(alone.values())) > len(alone) - 3


def test_who_is_attached_to_answer(home: Path, alone: dict[str, tuple[int, ...]]) -> None:
    base = kit.base()
    engine = engine_of(home, METHODS, base)
    requests = asked(engine, *METHODS, None)
    loop = loop_of(engine)
    while not all(one.tokens for one in requests):
        loop.turn()
    assert sorted(attached(engine)) == sorted(NAMED)
    assert all((one.slot >= 0) == (one.name in SLOTS) for one in requests)
    loop.finish(requests)
    assert all(tuple(one.tokens) == alone[one.name] for one in requests)
    assert len({alone[name] for name in METHODS}) == len(METHODS)
    assert not Stack.of(base.model).slots and loop.ledger.read == 0
    for name in NAMED:
        engine.tiers.lower(name)
    assert find_bank(base.model) is None


def test_every_verb_that_answers_knows_them(home: Path, alone: dict[str, tuple[int, ...]]) -> None:
    engine = engine_of(home, ["lora", "ia3"])
    names = ["lora", None, "ia3", "lora"]
    answers = engine.sample([TEXT] * 4, GREEDY, names)
    assert [one.tokens for one in answers] == [alone[name or ""] for name in names]
    for name in ("lora", "ia3"):
        with engine.stream(TEXT, GREEDY, name) as stream:
            assert "".join(stream) == stream.completion.text
        assert stream.completion.tokens == alone[name]
    with Desk(engine) as desk:
        futures = [desk.sample([TEXT], GREEDY, name) for name in names]
        assert [f.result(60)[0].tokens for f in futures] == [alone[name or ""] for name in names]
    drawn = GREEDY.replace(n=3, temperature=1.0, seed=4)
    assert len({one.tokens for one in engine.sample([TEXT], drawn, "lora")}) > 1


def test_many_more_than_there_is_room_for(home: Path, alone: dict[str, tuple[int, ...]]) -> None:
    """Some in slots of two forms and some attached, room for five or so: all are answered, each as alone."""
    names = [f"n{number}" for number in range(MANY)]
    large = bytes_of(home, "n2")  # four others in its place, or the slot of one
    engine = engine_of(home, names, active=large, host=3 * large, slots=4 * large)
    order = names * 2
    random.Random(1).shuffle(order)
    requests = asked(engine, *order)
    loop, seen = loop_of(engine), 0
    while loop.busy:
        loop.turn()
        seen = max(seen, len({one.name for one in loop.running}))
        assert Stack.of(engine.model).nbytes <= 4 * large and engine.tiers.active_bytes <= large
        assert engine.tiers.host_bytes <= 3 * large
    assert [tuple(one.tokens) for one in requests] == [alone[name] for name in order]
    assert 3 <= seen <= 12 and len(set(alone.values())) > MANY / 2


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_to_names_meanwhile(
    seed: int, home: Path, alone: dict[str, tuple[int, ...]]
) -> None:
    """Each request is answered by the adapter that had the name when it was asked, and nothing is left behind."""
    draw = random.Random(seed)
    folders = [f"n{number}" for number in range(12)] + ["prefix", "prompt", "gated"]
    large = bytes_of(home, "gated", "n2")
    engine = engine_of(home, (), active=large, host=2 * large, slots=slot_bytes(home, "n2"))
    tiers, loop = engine.tiers, loop_of(engine)
    meant: dict[str, str] = {}
    found: list[tuple[Request, str]] = []

    def rename(name: str) -> None:
        folder = draw.choice(folders)
        deed = tiers.replace if name in meant else tiers.register
        deed(name, AdapterFolder(home / folder))
        meant[name] = folder

    def ask(name: str) -> None:
        folder = meant.get(name, "")
        found.extend((one, folder) for one in asked(engine, name if folder else None))

    def forget(name: str) -> None:
        if meant.pop(name, None):
            tiers.forget(name)

    def lower(name: str) -> None:
        with suppress(AttachError):
            tiers.lower(name, "disk") if name in meant else None

    def cancel(name: str) -> None:
        draw.choice(found)[0].cancel() if found else None

    for _ in range(120):
        deed = draw.choices([rename, ask, forget, lower, cancel], [4, 12, 1, 1, 1])[0]
        deed(draw.choice("abcdef"))
        for _ in range(draw.randrange(3)):
            loop.turn()
    loop.finish([one for one, _ in found])
    for one, folder in found:
        whole = alone[folder]
        assert tuple(one.tokens) == (whole[: len(one.tokens)] if one.cancelled else whole)
    for name in list(meant):
        forget(name)
    assert tiers.host_bytes == tiers.active_bytes == loop.ledger.read == 0
    assert find_bank(engine.model) is None and sum(not one.cancelled for one, _ in found) > 40


@pytest.mark.parametrize("build", [tiny.falcon, tiny.llama], ids=["no pages", "some attentions"])
def test_answers_in_batches(build: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    base = kit.base(build().eval())  # type: ignore[arg-type]
    method = Prefix(length=3, layers=(1,)) if build is tiny.llama else "lora(rank=2)"
    adapters = [made(base, method, seed) for seed in range(3)]
    wanted = [said(base, adapter) for adapter in adapters]
    for number, adapter in enumerate(adapters):
        adapter.save(tmp_path / str(number))
    engine = engine_of(tmp_path, "012", base, active=2 * adapters[0].nbytes - 1)
    assert not engine.answering.paged("0")
    names = ["0", "1", None, "2", "0"]
    answers = engine.sample([TEXT] * 5, GREEDY, names)
    assert [answers[n].tokens for n in (0, 1, 3, 4)] == [*wanted, wanted[0]]
    with engine.stream(TEXT, GREEDY, "1") as stream:
        list(stream)
    assert stream.completion.tokens == wanted[1]
    assert len(attached(engine)) == 1


def test_one_in_training_answers_with_what_it_has_learnt(tmp_path: Path) -> None:
    """Registered and attached, lowered and from a slot: always its newest values, an answer's own to its end."""
    base = kit.base()
    tt.attach(base.model, "lora(rank=4)", "a")
    engine = Engine(base, folder=tmp_path)
    engine.tiers.adopt("a")

    def learn() -> None:
        while not isinstance(hold := engine.tiers.hold("a"), Hold):
            engine.tiers.wait()
        with hold:
            engine.forward_backward(kit.datums(), "a")
            engine.optim_step("a", AdamParams(lr=0.1))

    learn()
    (before,) = engine.sample([TEXT], GREEDY, "a")
    (during,) = asked(engine, "a")
    loop_of(engine).turn()
    learn()
    (after,) = engine.sample([TEXT], GREEDY, "a")
    loop_of(engine).finish([during])
    assert tuple(during.tokens) == before.tokens != after.tokens
    for tier in ("host", "disk"):
        engine.tiers.lower("a", tier)  # type: ignore[arg-type]
        assert engine.sample([TEXT], GREEDY, "a")[0] == after
        assert engine.tiers.tier("a") == "host" and attached(engine) == []
    long = [(7 * place) % 400 for place in range(70)]  # what was read of it is kept
    (old,) = engine.sample([long], GREEDY, "a")
    learn()
    (new,) = engine.sample([long], GREEDY, "a")
    engine.tiers.lower("a")
    assert engine.sample([long], GREEDY, "a") == [new] != [old]


def test_how_far_one_goes_is_not_forgotten(home: Path) -> None:
    engine = engine_of(home, ["lora"])
    (plain,) = engine.sample([TEXT], GREEDY, "lora")
    assert isinstance(engine.tiers.hold("lora"), Hold)
    tt.scale(engine.model, "lora", -3.0)
    (scaled,) = engine.sample([TEXT], GREEDY, "lora")
    engine = engine_of(home, ["lora"])
    engine.sample([TEXT], GREEDY, "lora")
    hold = engine.tiers.hold("lora")
    assert isinstance(hold, Hold)
    tt.scale(engine.model, "lora", -3.0)
    hold.release()
    engine.tiers.lower("lora")
    assert engine.sample([TEXT], GREEDY, "lora") == [scaled] != [plain]


# -- waiting -------------------------------------------------------------------------------------------


class Slow(Source):
    """A folder on a disk that gives it when it is told to."""

    files = ()

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.go = threading.Event()
        self._inner = AdapterFolder(folder)

    def check(self, forms: Forms) -> Packed:
        return self._inner.check(forms)

    def read(self) -> Read:
        assert self.go.wait(60)
        return self._inner.read()

    def write(self, name: str, packed: Packed) -> None:
        raise AssertionError


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_others_go_on_while_one_is_read(
    name: str, home: Path, alone: dict[str, tuple[int, ...]]
) -> None:
    engine = engine_of(home, ["rslora", "ia3"])
    engine.tiers.register("slow", source := Slow(home / name))
    slow, *others = asked(engine, "slow", "rslora", "ia3", None)
    loop = loop_of(engine)
    loop.finish(others)
    assert [tuple(one.tokens) for one in others] == [alone["rslora"], alone["ia3"], alone[""]]
    assert not slow.tokens and engine.tiers.tier("slow") == "disk"
    source.go.set()
    loop.finish([slow])
    assert tuple(slow.tokens) == alone[name]


def test_cancelled_while_it_is_read(home: Path, alone: dict[str, tuple[int, ...]]) -> None:
    engine = engine_of(home, ["lora"])
    engine.tiers.register("slow", source := Slow(home / "ia3"))
    slow, other = asked(engine, "slow", "lora")
    loop = loop_of(engine)
    loop.turn()
    slow.cancel()
    loop.finish([slow, other])
    assert slow.completion().finish == "cancelled" and tuple(other.tokens) == alone["lora"]
    source.go.set()
    engine.tiers.wait(60)
    assert engine.tiers.tier("slow") == "host" and not loop.busy
    engine.tiers.forget("slow")
    assert engine.tiers.host_bytes == bytes_of(home, "lora")


def test_who_waits_longest_for_room_gets_it_first(
    home: Path, alone: dict[str, tuple[int, ...]]
) -> None:
    """Though requests for the adapter that has the only slot never cease."""
    engine = engine_of(home, ["lora", "rslora"], slots=slot_bytes(home, "lora"))
    loop = loop_of(engine)
    tt.attach(engine.model, Adapter.load(home / "n1"), "learning")
    for name in ("lora", "learning"):
        running = asked(engine, name)
        while not running[0].tokens:
            loop.turn()
        assert running[0].slot >= 0
        (late,) = asked(engine, "rslora")
        turns = 0
        while not late.done:
            running += asked(engine, name)
            loop.turn()
            turns += 1
            assert turns < 3 * GREEDY.max_tokens
        loop.finish(running)
        assert tuple(late.tokens) == alone["rslora"]
        wanted = alone["lora" if name == "lora" else "n1"]
        assert {tuple(one.tokens) for one in running} == {wanted}


def test_who_cannot_lie_in_the_slots_that_there_are_is_attached(
    home: Path, alone: dict[str, tuple[int, ...]]
) -> None:
    engine = engine_of(home, ["lora", "wide"], slots=slot_bytes(home, "lora"))
    one, other = asked(engine, "lora", "wide")
    while not (one.tokens and other.tokens):
        loop_of(engine).turn()
    assert one.slot >= 0 and other.slot < 0 and attached(engine) == ["wide"]
    loop_of(engine).finish([one, other])
    assert [tuple(r.tokens) for r in (one, other)] == [alone["lora"], alone["wide"]]


# -- faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "ia3"], ids=["in a slot", "by name"])
def test_forgotten_while_it_answers(
    name: str, home: Path, alone: dict[str, tuple[int, ...]]
) -> None:
    """It is answered to its end, as what was asked before; who asks later is told that there is none."""
    engine = engine_of(home, [name, "dora"])
    engine.tiers.register("slow", source := Slow(home / "prefix"))
    requests = asked(engine, name, "dora", "slow")
    loop = loop_of(engine)
    while not requests[0].tokens:
        loop.turn()
    for gone in (name, "slow"):
        engine.tiers.forget(gone)
    assert name not in engine.tiers
    with pytest.raises(
        UnknownNameError, match="'dorra' is attached or registered. Did you mean 'dora'"
    ):
        asked(engine, "dorra")
    with pytest.raises(UnknownNameError, match=f"no adapter {name!r}"):
        asked(engine, name)
    source.go.set()
    loop.finish(requests)
    assert [tuple(r.tokens) for r in requests] == [alone[n] for n in (name, "dora", "prefix")]
    engine.tiers.forget("dora")
    assert engine.tiers.host_bytes == engine.tiers.active_bytes == 0
    assert find_bank(engine.model) is None


@pytest.mark.parametrize(
    ("name", "new"), [("lora", "rslora"), ("lora", "ia3"), ("ia3", "dora"), ("dora", "lora")]
)
def test_replaced_while_it_answers(
    name: str, new: str, home: Path, alone: dict[str, tuple[int, ...]]
) -> None:
    """Who has begun goes on with the one before, and who asks later gets the new one."""
    engine = engine_of(home, [name, "prompt"])
    loop = loop_of(engine)
    first = asked(engine, name, "prompt")
    while not first[0].tokens:
        loop.turn()
    engine.tiers.replace(name, AdapterFolder(home / new))
    second = asked(engine, name, name)
    loop.finish([*first, *second])
    assert [tuple(r.tokens) for r in first] == [alone[name], alone["prompt"]]
    assert [tuple(r.tokens) for r in second] == [alone[new]] * 2
    assert engine.sample([TEXT], GREEDY, name)[0].tokens == alone[new]
    for left in (name, "prompt"):
        engine.tiers.forget(left)
    assert engine.tiers.host_bytes == 0 and find_bank(engine.model) is None


def _torn(folder: Path, _: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _missing(folder: Path, _: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _no_json(folder: Path, _: Path) -> None:
    (folder / "adapter_config.json").write_text("{not")


def _anothers(folder: Path, home: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(home / "n1", folder)


@pytest.mark.parametrize("harm", [_torn, _missing, _no_json, _anothers])
@pytest.mark.parametrize("name", ["n0", "n3"], ids=["in a slot", "by name"])
def test_a_broken_folder_is_the_error_of_those_who_asked_for_it(
    harm: Callable[[Path, Path], None], name: str, home: Path, tmp_path: Path,
    alone: dict[str, tuple[int, ...]],
) -> None:  # fmt: skip
    shutil.copytree(home / name, tmp_path / "sick")
    names = ["lora", "ia3"]
    engine = engine_of(home, names)
    engine.tiers.register("sick", AdapterFolder(tmp_path / "sick"))
    others = asked(engine, *names, None)
    loop = loop_of(engine)
    loop.turn()
    harm(tmp_path / "sick", home)
    sick = asked(engine, "sick", "sick")
    loop.finish([*others, *sick])
    assert [tuple(r.tokens) for r in others] == [alone[n] for n in (*names, "")]
    for one in sick:
        with pytest.raises(FileFormatError, match="was changed since its adapter was registered"):
            one.completion()
    if harm is not _anothers:
        with pytest.raises(FileFormatError):
            engine.tiers.replace("sick", AdapterFolder(tmp_path / "sick"))
        shutil.rmtree(tmp_path / "sick")
        shutil.copytree(home / name, tmp_path / "sick")
    engine.tiers.replace("sick", AdapterFolder(tmp_path / "sick"))
    wanted = alone["n1" if harm is _anothers else name]
    assert engine.sample([TEXT], GREEDY, "sick")[0].tokens == wanted


def test_taken_out_by_another_hand(home: Path, alone: dict[str, tuple[int, ...]]) -> None:
    engine = engine_of(home, ["ia3", "lora"])
    one, other = asked(engine, "ia3", "lora")
    loop = loop_of(engine)
    while not one.tokens:
        loop.turn()
    tt.detach(engine.model, "ia3")
    loop.finish([other])
    with pytest.raises(UnknownNameError, match="'ia3' was taken out"):
        one.completion()
    assert tuple(other.tokens) == alone["lora"]


def test_what_is_held_by_others_is_not_waited_for_in_vain(
    home: Path, alone: dict[str, tuple[int, ...]]
) -> None:
    engine = engine_of(home, ["dora", "lora"], active=bytes_of(home, "dora"))
    engine.tiers.put(Adapter.load(home / "n3").detached(name="n3"))
    engine.sample([TEXT], GREEDY, "dora")
    hold = engine.tiers.hold("dora")
    assert isinstance(hold, Hold)
    with pytest.raises(AnswerError, match="no room for adapter 'n3'"):
        engine.sample([TEXT], GREEDY, "n3")
    assert engine.sample([TEXT], GREEDY, "lora")[0].tokens == alone["lora"]
    hold.release()
    assert engine.sample([TEXT], GREEDY, "n3")[0].tokens == alone["n3"]


def test_names_and_sizes(home: Path) -> None:
    one = bytes_of(home, "lora")
    engine = engine_of(home, ["lora"], active=one, host=one)
    with pytest.raises(ConfigError, match="'wide' takes .* where all may take"):
        engine.tiers.register("wide", AdapterFolder(home / "wide"))
    tt.attach(engine.model, "ia3", "mine")
    with pytest.raises(DuplicateNameError, match="'mine' is attached already"):
        engine.tiers.register("mine", AdapterFolder(home / "lora"))
    with pytest.raises(DuplicateNameError, match="'lora' is registered already"):
        engine.tiers.register("lora", AdapterFolder(home / "ia3"))
    with pytest.raises(UnknownNameError, match="no adapter 'nobody' is registered"):
        engine.tiers.replace("nobody", AdapterFolder(home / "ia3"))
    with pytest.raises(UnknownNameError, match="Did you mean 'mine'"):
        engine.stream(TEXT, GREEDY, "mien")
    with Desk(engine) as desk, pytest.raises(UnknownNameError, match="Did you mean 'lora'"):
        desk.sample([TEXT], GREEDY, "loora").result(60)


def test_loaded_swapped_and_unloaded_at_a_desk(
    home: Path, alone: dict[str, tuple[int, ...]]
) -> None:
    """In the order in which it is asked."""
    engine = engine_of(home, ["rslora"])
    long = GREEDY.replace(max_tokens=60)
    with Desk(engine) as desk:
        other = desk.sample([TEXT], long, "rslora")
        found = []
        for name in ("lora", "ia3", "prefix"):
            source = AdapterFolder(home / name)
            deed = engine.tiers.replace if found else engine.tiers.register
            desk.call("a", partial(deed, "a", source)).result(60)
            found.append(desk.sample([TEXT], GREEDY, "a"))
        desk.call("a", partial(engine.tiers.forget, "a"))
        late = desk.sample([TEXT], GREEDY, "a")
        assert [f.result(60)[0].tokens for f in found] == [
            alone[n] for n in ("lora", "ia3", "prefix")
        ]
        with pytest.raises(UnknownNameError, match="no adapter 'a'"):
            late.result(60)
        assert other.result(60) == engine.sample([TEXT], long, "rslora")
