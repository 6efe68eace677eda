"""AdaLoRA's budget: PEFT's allocation step by step, the schedule, resume, and what is left in the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel
from torch import nn

import trimtab as tt
from tests import tiny
from tests.oracles import kit
from trimtab.adapt.bank import bank_of
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.errors import ConfigError, TrainingError
from trimtab.optim.params import AdamParams

QV = ("q_proj", "v_proj")
TOTAL = 12
OPTIONS = {"tinit": 2, "tfinal": 3, "beta1": 0.8, "beta2": 0.9}


def ada(**changes: object) -> tt.AdaLoRA:
    return tt.AdaLoRA(**{"rank": 4, "target_rank": 2, "alpha": 6, "targets": QV, **OPTIONS, **changes})  # fmt: skip


def both(every: int = 1) -> tuple[PeftModel, nn.Module, tt.Adapter, kit.Pairs]:
    """PEFT's model and ours with the same values, in fp64."""
    config = AdaLoraConfig(
        target_modules=list(QV), init_r=4, target_r=2, lora_alpha=6, total_step=TOTAL, deltaT=every, **OPTIONS
    )  # fmt: skip
    theirs = kit.peft_model(kit.llama, config).double()
    model = kit.llama()
    adapter = tt.attach(model, ada(every=every), "default")
    model.double()
    kit.stir(adapter)
    pairs = kit.paired(adapter, theirs)
    kit.give(pairs)
    return theirs, model, adapter, pairs


def singular(adapter: tt.Adapter) -> dict[str, torch.Tensor]:
    return {key: t for key, t in adapter.tensors.items() if key.endswith("lora_E")}


@pytest.mark.parametrize("every", [1, 3])
def test_the_allocation_is_that_of_peft_step_by_step(every: int) -> None:
    theirs, model, adapter, pairs = both(every)
    batch = kit.batch_of(model)
    steps = tt.Stepper(adapter, total=TOTAL)
    left = []
    for step in range(1, TOTAL + 1):
        for side, parameters in (
            (model, [ours for ours, _ in pairs.values()]),
            (theirs, [other for _, other in pairs.values()]),
        ):
            optimiser = torch.optim.SGD(parameters, lr=0.1)
            optimiser.zero_grad()
            kit.objective(kit.outputs(side, batch)).backward()
            optimiser.step()
        steps.after()
        theirs.base_model.update_and_allocate(step)
        for key, (ours, other) in pairs.items():
            torch.testing.assert_close(ours, other, atol=1e-10, rtol=1e-10, msg=key)
        left.append(sum(int((e != 0).sum()) for e in singular(adapter).values()))
    first, last = 4 * 6, 2 * 6
    allowed = [adapter.method.budget.left(step, TOTAL, first, last) for step in range(1, TOTAL + 1)]
    assert allowed == [24, 24, 19, 16, 14, 12, 12, 12, 12, 12, 12, 12]  # 12 + 12 (1 − (t − 2) / 7)³
    cuts = [s for s in range(1, TOTAL + 1) if s <= 2 or s % every == 0 or s >= TOTAL - 3]
    assert all(left[step - 1] <= allowed[step - 1] for step in cuts)
    assert left[0] == first and left[-1] == last
    assert set(steps.memory) == {f"0.{key.removesuffix('.lora_E')}.kept" for key in singular(adapter)}  # fmt: skip


def test_the_regulariser_is_that_of_peft() -> None:
    theirs, model, _, pairs = both()
    batch = kit.batch_of(model)
    labels = batch["input_ids"]
    for side in (model, theirs):
        side.train()
    loss = theirs.base_model(**batch, labels=labels).loss
    # Without a task type, a call of PEFT's outer model leaves the regulariser out, in silence.
    assert theirs(**batch, labels=labels).loss < loss - 0.5
    loss.backward()
    ours = model(**batch, labels=labels).loss
    extra = bank_of(model).take_losses()
    assert len(extra) == 6 and all(name == "orthogonality" for _, name, _ in extra)
    total = ours + sum(value for _, _, value in extra)
    torch.testing.assert_close(total, loss.double())
    total.backward()
    for key, (mine, other) in pairs.items():
        torch.testing.assert_close(mine.grad, other.grad, msg=key)
    with torch.no_grad():  # nothing is added for components that are orthonormal, nor at evaluation
        for key, (mine, _) in pairs.items():
            if not key.endswith("E"):
                nn.init.orthogonal_(mine)
        model(**batch)
        assert sum(float(value) for _, _, value in bank_of(model).take_losses()) < 1e-5
        model.eval()(**batch)
        assert not bank_of(model).take_losses()


def data() -> list[Datum]:
    return [
        Datum.causal([3, 4, 5, 6, 7], [0, 0, 1, 1, 1]),
        Datum.causal([8, 9, 10, 11], [0, 0, 1, 1]),
    ]


def adam(total: int | None = TOTAL) -> AdamParams:
    return AdamParams(lr=0.05, total=total)


def trained(engine: Engine, steps: int, total: int | None = TOTAL) -> Iterator[float]:
    for _ in range(steps):
        result = engine.forward_backward(data(), "a")
        engine.optim_step("a", adam(total))
        yield result.auxiliary["a.orthogonality"]


def test_the_engine_runs_the_schedule_and_resumes_bitwise(tmp_path: Path) -> None:
    model = tiny.llama()
    straight = tt.attach(model, ada(), "a")
    losses = list(trained(Engine(model), TOTAL))
    assert losses[-1] < losses[0]
    assert sum(int((e != 0).sum()) for e in singular(straight).values()) == 12
    for stop in (5, 10):  # while ranks are shared out, and after
        model = tiny.llama()
        tt.attach(model, ada(), "a")
        engine = Engine(model)
        list(trained(engine, stop))
        engine.save("a", tmp_path / str(stop))
        model = tiny.llama()
        again = Engine(model)
        again.load(tmp_path / str(stop))
        list(trained(again, TOTAL - stop))
        resumed = bank_of(model).require("a")
        assert all(torch.equal(resumed.tensors[k], v) for k, v in straight.tensors.items())


def test_what_is_shared_is_a_lora_of_the_ranks_left_and_peft_reads_it(tmp_path: Path) -> None:
    model = kit.llama()
    adapter = tt.attach(model, ada(), "default")
    kit.stir(adapter)
    with torch.no_grad():
        for number, e in enumerate(singular(adapter).values()):
            e[number % 5 :] = 0.0  # 0, 1, 2, 3, 4, 0 left
    plain = tt.exported(adapter)
    ranks = [t.shape[0] for key, t in plain.tensors.items() if key.endswith("lora_A.weight")]
    assert plain.method.kind == "lora" and sorted(ranks) == [1, 1, 1, 2, 3, 4]
    batch = kit.batch_of(model)
    expected = kit.outputs(model, batch).detach()
    fresh = kit.llama()
    tt.attach(fresh, plain)
    kit.assert_close(kit.outputs(fresh, batch), expected, "exported")
    plain.save(tmp_path / "plain")
    adapter.save(tmp_path / "whole")
    for folder in ("plain", "whole"):
        with kit.quiet():
            theirs = PeftModel.from_pretrained(kit.llama(), tmp_path / folder).eval()
        kit.assert_close(kit.outputs(theirs, batch), expected, folder)


def test_experts_and_convolutions_export_too() -> None:
    for make, targets, inputs in (
        (tiny.mixtral, "**.experts.*_proj", {"input_ids": torch.arange(3, 9)[None]}),
        (tiny.mixed, ("embed", "re:conv.*", "grouped"), {"x": torch.arange(3, 11)[None]}),
    ):
        model = make()
        adapter = tt.attach(model, ada(targets=targets), "a")
        kit.stir(adapter)
        with torch.no_grad():
            for e in singular(adapter).values():
                e[..., 2:, :] = 0.0
        fresh = make()
        plain = tt.attach(fresh, tt.exported(adapter))
        assert plain.count < adapter.count
        torch.testing.assert_close(tiny.output(fresh, inputs), tiny.output(model, inputs))


def test_a_file_that_peft_trimmed_is_read_and_written(tmp_path: Path) -> None:
    """Its tensors have the ranks that are left (none, in one place); its scale stays that of the first rank."""
    theirs, _, _, pairs = both()
    with torch.no_grad():
        for number, (key, (_, other)) in enumerate(pairs.items()):
            if key.endswith("lora_E"):
                other[number // 3 % 5 :] = 0.0
    config = theirs.peft_config["default"]
    config.rank_pattern = {
        name.removeprefix("base_model.model."): (p != 0).flatten().tolist()
        for name, p in theirs.named_parameters()
        if "lora_E" in name
    }
    with kit.quiet("Adapter 'default': 4 LoRA tensor"):  # it takes the empty ones for shards
        theirs.float().save_pretrained(tmp_path / "theirs")
    model = kit.llama()
    adapter = tt.attach(model, tt.Adapter.load(tmp_path / "theirs"), "default")
    ranks = [e.shape[0] for e in singular(adapter).values()]
    assert sorted(ranks) == [0, 0, 1, 2, 3, 4]
    batch = kit.batch_of(model)
    expected = kit.outputs(theirs.eval(), batch)
    kit.assert_close(kit.outputs(model, batch), expected, "read")
    adapter.save(tmp_path / "ours")
    with kit.quiet("The following rank_pattern keys did not match"):  # of its own files too
        again = PeftModel.from_pretrained(kit.llama(), tmp_path / "ours").eval()
    kit.assert_close(kit.outputs(again, batch), expected, "written")
    plain = kit.llama()
    tt.attach(plain, tt.exported(adapter))
    kit.assert_close(kit.outputs(plain, batch), expected, "exported")


# -- guards -------------------------------------------------------------------------------------------


def test_nothing_to_cut_is_no_error() -> None:
    """PEFT asks for the zeroth value of a list where the target is the first rank, and fails."""
    model = tiny.llama()
    adapter = tt.attach(model, ada(target_rank=4), "a")
    list(trained(Engine(model), TOTAL))
    assert all(bool((e != 0).all()) for e in singular(adapter).values())


def test_an_unknown_length_is_an_error_at_the_first_step_that_needs_it() -> None:
    model = tiny.llama()
    tt.attach(model, ada(), "a")
    engine = Engine(model)
    list(trained(engine, 2, total=None))
    with pytest.raises(TrainingError, match="give total"):
        list(trained(engine, 1, total=None))


def test_a_schedule_without_room_is_an_error() -> None:
    model = tiny.llama()
    tt.attach(model, ada(tinit=5, tfinal=7), "a")
    with pytest.raises(ConfigError, match="leave none of 12 steps"):
        list(trained(Engine(model), 6))


def test_gradients_that_are_gone_are_an_error() -> None:
    model = tiny.llama()
    steps = tt.Stepper(tt.attach(model, ada(), "a"), total=TOTAL)
    with pytest.raises(TrainingError, match="before they are cleared"):
        steps.after()


@pytest.mark.parametrize("options", [{"target_rank": 5}, {"rslora": True}])
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ada(**options)


def test_sums_and_scales_are_exact() -> None:
    model = tiny.llama()
    parts = [tt.attach(model, ada(rank=rank), f"a{rank}") for rank in (3, 4)]
    for part in parts:
        kit.stir(part, seed=part.method.rank)
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    fresh = tiny.llama()
    tt.attach(fresh, tt.add([part.detached() for part in parts], name="sum", weights=[0.5, 1.0]))
    tt.scale(model, "a3", 0.5)
    torch.testing.assert_close(tiny.output(fresh, inputs), tiny.output(model, inputs))
