"""Golden files: what ``adapters`` and ``pyreft`` compute (see the scripts in golden/), and where they differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import trimtab as tt
from trimtab.adapt.bank import bank_of

FOLDER = Path(__file__).parent / "golden"
DEVIATES = {"llama.par_bn"}
"""Cases in which it does not compute what the paper says; each has a test of its own below."""
CASES = sorted(
    path.stem for path in FOLDER.glob("*.*.safetensors") if not path.stem.endswith(".base")
)


def metadata(stem: str) -> dict[str, str]:
    with safe_open(FOLDER / f"{stem}.safetensors", "pt") as file:
        return dict(file.metadata())


def tensors(case: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{case}.safetensors")


def base_of(case: str) -> nn.Module:
    """The tiny model of a case, in fp64."""
    stem = f"{case.split('.')[0]}.base"
    facts = metadata(stem)
    config = getattr(transformers, f"{facts['model']}Config")(**json.loads(facts["sizes"]))
    model: nn.Module = getattr(transformers, f"{facts['model']}Model")(config)
    missing = model.load_state_dict(tensors(stem), strict=False)
    assert not missing.missing_keys, missing
    return model.double().eval()


def outputs(model: nn.Module, found: dict[str, Tensor]) -> Tensor:
    inputs = {k.removeprefix("input."): v for k, v in found.items() if k.startswith("input.")}
    out: Tensor = model(**inputs).last_hidden_state
    return out if "decoder_input_ids" in inputs else out[inputs["attention_mask"].bool()]


def attached(case: str, model: nn.Module, found: dict[str, Tensor]) -> tt.Adapter:
    """Our adapter with the file's values, in fp64 as the file's results."""
    adapter = tt.attach(model, metadata(case)["method"], "a")
    given = {k.removeprefix("adapter."): v for k, v in found.items() if k.startswith("adapter.")}
    assert given.keys() == adapter.tensors.keys()
    with torch.no_grad():
        for key, tensor in adapter.tensors.items():
            assert tensor.shape == given[key].shape, key
            tensor.data = given[key].double()
    return adapter


@pytest.mark.parametrize("case", [case for case in CASES if case not in DEVIATES])
def test_outputs_and_gradients_are_those_of_adapters(case: str) -> None:
    found, model = tensors(case), base_of(case)
    bare = outputs(model, found)
    adapter = attached(case, model, found)
    ours = outputs(model, found)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, found["output"], atol=1e-5, rtol=1e-5)
    direction = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    (ours.sin() * direction).sum().backward()
    fixed = {name.key for name in adapter.fixed}
    for key, tensor in adapter.tensors.items():
        if key in fixed:
            assert not tensor.requires_grad
        elif not key.endswith("basis") or "noreft" in case or "direft" in case:
            theirs = found[f"gradient.{key}"]
            torch.testing.assert_close(
                tensor.grad, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith(".fusion")])
def test_the_loss_on_the_value_matrices_is_theirs_and_is_added(case: str) -> None:
    """There it is a function to be called by hand; here the engine adds it."""
    found, model = tensors(case), base_of(case)
    attached(case, model, found)
    model.train()
    outputs(model, found)
    losses = bank_of(model).take_losses()
    total = sum(float(loss.detach()) for _, _, loss in losses)
    assert total == pytest.approx(float(found["regularisation"]), rel=1e-6)


def test_a_parallel_adapter_reads_what_the_feed_forward_reads() -> None:
    """In pre-norm models ``adapters`` gives it the residual stream instead: its result is that of such a hook."""
    found, model = tensors("llama.par_bn"), base_of("llama.par_bn")
    adapter = attached("llama.par_bn", model, found)
    assert (outputs(model, found) - found["output"]).abs().max() > 1e-2
    p = {key: tensor.detach() for key, tensor in adapter.tensors.items()}
    tt.detach(model, "a")
    for number, block in enumerate(model.layers):
        residual: list[Tensor] = []

        def before(
            module: nn.Module, args: tuple[Tensor], residual: list[Tensor] = residual
        ) -> None:
            residual[:] = [args[0]]

        def after(
            module: nn.Module,
            args: object,
            y: Tensor,
            at: str = f"layers.{number}.mlp",
            r: list[Tensor] = residual,
        ) -> Tensor:
            z = (r[0] @ p[f"{at}.adapter_down.weight"].T + p[f"{at}.adapter_down.bias"]).relu()
            return y + 4 * (z @ p[f"{at}.adapter_up.weight"].T + p[f"{at}.adapter_up.bias"])

        block.post_attention_layernorm.register_forward_pre_hook(before)
        block.mlp.register_forward_hook(after)
    torch.testing.assert_close(outputs(model, found), found["output"], atol=1e-5, rtol=1e-5)


# -- pyreft (see golden/make_pyreft.py) -----------------------------------------------------------------

PYREFT = load_file(FOLDER / "pyreft.safetensors")
WIDTH, FIRST, LAST = 12, 3, 2


def intervened(kind: str, end: str, length: int) -> tuple[set[int], Tensor]:
    """The positions that one end of our method edits, with pyreft's tensors there, and its whole output."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).eval()
    h = PYREFT["h"][:, :length]
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(WIDTH))
        tt.attach(model, f"{kind}(rank=3, first={FIRST}, last={LAST}, targets='0')", "a")
        for key, tensor in bank_of(model).adapters["a"].tensors.items():
            _, at, short = key.removeprefix("0.").split("_")
            tensor.copy_(PYREFT[f"{kind}.{short}"])
            if (
                at != end
            ):  # the other end does nothing: W = R and b = 0, or W = 0 where nothing is subtracted
                nothing = torch.zeros(3, WIDTH) if kind == "direft" else PYREFT[f"{kind}.basis"]
                tensor.copy_(torch.zeros(3) if short == "b" else nothing)
        out = model(h)
    changed = ((out - h).abs().amax(-1)[0] > 1e-5).nonzero().flatten().tolist()
    return set(changed), out


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft"])
def test_interventions_are_pyrefts(kind: str) -> None:
    """At the same positions of a prompt that is long enough for both ends."""
    result = PYREFT[f"{kind}.result"]
    for length in (6, 9, 12):
        theirs = PYREFT[f"positions.{length}"].tolist()
        for end, wanted in zip(("first", "last"), theirs, strict=True):
            positions, out = intervened(kind, end, length)
            assert positions == set(wanted) - {-1}
            for position in positions:
                torch.testing.assert_close(
                    out[0, position], result[0, position], atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_short_prompts_are_edited_whole(length: int) -> None:
    """pyreft gives each end half of a short prompt, rounded down: the middle one of an odd number is left out."""
    ours = [intervened("loreft", end, length)[0] for end in ("first", "last")]
    theirs = [set(end) - {-1} for end in PYREFT[f"positions.{length}"].tolist()]
    assert ours[0] | ours[1] == set(range(length)) and not ours[0] & ours[1]
    assert theirs[0] <= ours[0] and theirs[1] <= ours[1]
    assert len(ours[0] | ours[1]) - len(theirs[0] | theirs[1]) == length % 2


def test_direft_of_the_paper_is_not_pyrefts_class_of_that_name() -> None:
    """The paper's W₂ is free; pyreft's is held orthonormal, so what it finds is one point of ours."""
    basis = PYREFT["direft.basis"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), atol=1e-5, rtol=1e-5)
    ours = tt.attach(nn.Sequential(nn.Linear(WIDTH, WIDTH)), "direft(rank=3, targets='0')", "a")
    free = ours.tensors["0.reft_first_basis"].detach()
    assert (free @ free.T - torch.eye(3)).abs().max() > 0.1
