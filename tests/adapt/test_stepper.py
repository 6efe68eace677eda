"""Hooks around the optimiser's steps, tensors that are fixed or drawn again, and the form to share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, final

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import trimtab as tt
from tests import tiny
from trimtab.adapt.contract import At, Layer, Method, Params, Place, Progress, Sites, Spec, zeros
from trimtab.adapt.parse import methods
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.errors import AttachError
from trimtab.optim.params import AdamParams

ADAM = AdamParams(lr=0.1, total=7)


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@final
class Shift(Method):
    """A bias through a fixed sign and a drawn scale, with a schedule that halves it."""

    kind: ClassVar[str] = "test-shift"
    short_names: ClassVar[Mapping[str, str]] = {"shift": "b", "sign": "s"}
    targets: str | tuple[str, ...] = "v_proj"
    halve: bool = False

    @property
    def fixed(self) -> frozenset[str]:
        return frozenset({"sign"})

    @property
    def rates(self) -> Mapping[str, float]:
        return {"shift": 2.0}

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        shape = (layer.out_features,)
        return {
            "b": Spec("shift", shape, zeros),
            "s": Spec("sign", shape, lambda s, g: torch.where(torch.rand(s, generator=g) < 0.5, -1.0, 1.0)),
            "scale": Spec("scale", shape, drawn, stored=False),
        }  # fmt: skip

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        return y + p["b"] * p["s"] * p["scale"]

    def before_step(self, sites: Sites) -> None:
        for params in sites.values():
            gradient = params["b"].grad
            assert gradient is not None
            gradient.sign_()

    def after_step(self, sites: Sites, memory: dict[str, Tensor], progress: Progress) -> None:
        assert progress.total == ADAM.total
        for place, params in sites.items():
            memory[place.path] = memory.get(place.path, torch.zeros(())) + 1
            if self.halve:
                params["b"].mul_(0.5)

    def plain(self) -> Method:
        return methods.get("bitfit").parse({"targets": self.targets})

    def plain_tensors(
        self, tensors: Mapping[str, Tensor], place: Place | None
    ) -> dict[str, Tensor]:
        scale = drawn(tuple(tensors["shift"].shape), torch.Generator())
        return {"bitfit_bias": tensors["shift"] * tensors["sign"] * scale}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    methods.add(Shift.kind, Shift)
    yield
    methods.remove(Shift.kind)


def trained(method: Method, steps: int) -> tuple[Engine, tt.Adapter, torch.nn.Module]:
    model = tiny.llama()
    adapter = tt.attach(model, method, "a")
    engine = Engine(model)
    for _ in range(steps):
        engine.forward_backward(data(), "a")
        engine.optim_step("a", ADAM)
    return engine, adapter, model


def data() -> list[Datum]:
    return [
        Datum.causal([3, 4, 5, 6, 7], [0, 0, 1, 1, 1]),
        Datum.causal([8, 9, 10, 11], [0, 0, 1, 1]),
    ]


def test_fixed_tensors_and_draws_are_not_trained_and_only_the_first_are_stored(
    tmp_path: Path,
) -> None:
    _, adapter, model = trained(Shift(), 2)
    width = 16  # two key heads of eight
    assert adapter.count == 3 * width
    assert {p.shape for p in adapter.parameters()} == {(width,)} and len(
        list(adapter.parameters())
    ) == 3
    signs = [t for key, t in adapter.tensors.items() if key.endswith("sign")]
    assert all(bool((sign.abs() == 1).all()) for sign in signs)
    adapter.save(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sorted({key.rpartition(".")[2] for key in stored}) == ["shift", "sign"]
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    fresh = tiny.llama()
    tt.attach(fresh, tt.Adapter.load(tmp_path / "a"))
    assert torch.equal(tiny.output(fresh, inputs), tiny.output(model, inputs))
    assert set(fresh.state_dict()) == set(model.state_dict())


def test_another_draw_is_noticed(tmp_path: Path) -> None:
    _, adapter, _ = trained(Shift(), 1)
    adapter.save(tmp_path / "a")
    loaded = tt.Adapter.load(tmp_path / "a")
    loaded.drawn = dict.fromkeys(loaded.drawn, "0" * 64)
    with pytest.raises(AttachError, match="from a seed or from the base"):
        tt.attach(tiny.llama(), loaded)


def test_the_hooks_run_once_a_step_and_the_rate_is_scaled() -> None:
    engine, adapter, _ = trained(Shift(), 1)
    # Adam's first step moves each value by the rate, whatever the gradient: here twice the rate.
    moved = torch.cat([p.detach().abs() for p in adapter.parameters()])
    assert torch.allclose(moved[moved > 0], torch.tensor(0.2), atol=1e-4)
    memory = engine._tenant("a").stepper.memory
    assert len(memory) == 3 and all(float(value) == 1 for value in memory.values())


def test_a_schedule_resumes_bitwise(tmp_path: Path) -> None:
    _, straight, _ = trained(Shift(halve=True), 4)
    engine, _, _ = trained(Shift(halve=True), 2)
    engine.save("a", tmp_path / "state")
    model = tiny.llama()
    again = Engine(model)
    again.load(tmp_path / "state")
    for _ in range(2):
        again.forward_backward(data(), "a")
        again.optim_step("a", ADAM)
    resumed = again._tenant("a")
    assert all(torch.equal(resumed.adapter.tensors[k], v) for k, v in straight.tensors.items())
    assert all(float(value) == 4 for value in resumed.stepper.memory.values())


def test_the_exported_form_has_the_same_edit() -> None:
    _, adapter, model = trained(Shift(), 2)
    plain = tt.exported(adapter, name="plain")
    assert plain.method.kind == "bitfit"
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    fresh = tiny.llama()
    tt.attach(fresh, plain)
    torch.testing.assert_close(tiny.output(fresh, inputs), tiny.output(model, inputs))


def test_a_loop_of_ones_own_does_the_same() -> None:
    _, theirs, _ = trained(Shift(halve=True), 3)
    model = tiny.llama()
    adapter = tt.attach(model, Shift(halve=True), "a")
    optimiser = torch.optim.AdamW(
        tt.parameter_groups(adapter, lr=ADAM.lr), betas=(ADAM.beta1, ADAM.beta2)
    )
    steps = tt.Stepper(adapter, total=ADAM.total)
    engine = Engine(model)
    for _ in range(3):
        optimiser.zero_grad()
        loss = engine.forward_backward(data(), "a")
        for parameter in adapter.parameters():
            assert parameter.grad is not None
            parameter.grad /= sum(loss.weights)
        steps.before()
        torch.nn.utils.clip_grad_norm_(list(adapter.parameters()), ADAM.clip)
        optimiser.step()
        steps.after()
    for key, value in theirs.tensors.items():
        torch.testing.assert_close(adapter.tensors[key], value)
