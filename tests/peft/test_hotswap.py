"""Hot swap: values in place, nothing compiled anew, and nothing changed where the new adapter does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from peft.utils.hotswap import prepare_model_for_compiled_hotswap as peft_prepare
from torch import Tensor, nn

import trimtab as tt
import trimtab.peft as face
from tests import tiny
from tests.laws.cells import shaken
from tests.peft.kit import both, logits, made, quiet
from trimtab.errors import AttachError, BaseMismatchError, ConfigError, UnknownNameError
from trimtab.peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
COMPILED = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)


class Counting:
    """A compiler that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def saved(
    folder: Path, config: dict[str, Any], base: nn.Module | None = None
) -> tuple[Path, Tensor]:
    """A folder with another adapter, and what a model computes with it."""
    model = made(face, {"default": config}, base=base)
    shift(model)
    model.save_pretrained(folder)
    return folder, logits(model)


@torch.no_grad()
def shift(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.mul_(-1.5).add_(0.05)


def parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}


OTHERS: dict[str, dict[str, Any]] = {
    "same": PLAIN,
    "alpha": {**PLAIN, "lora_alpha": 3},
    "smaller": {**PLAIN, "r": 2},
    "rslora": {**PLAIN, "r": 3, "use_rslora": True},
    "patterns": {**PLAIN, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"q_proj": 20}},
    "fewer": {**PLAIN, "target_modules": ["v_proj"]},
}
BIASED = {**PLAIN, "lora_bias": True}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("own", [PLAIN, BIASED], ids=["plain", "biased"])
def test_swapped_is_the_other_in_the_same_parameters(
    own: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    folder, expected = saved(tmp_path, {**other, "lora_bias": "lora_bias" in own})
    model = made(face, {"default": own})
    before = parameters(model)
    assert not torch.allclose(logits(model), expected, **CLOSE)
    hotswap_adapter(model, folder, "default")
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert parameters(model) == before
    again = tmp_path / "again"
    model.save_pretrained(again)
    with quiet("`lora_bias=True` was passed"):
        theirs = peft.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), again)
    torch.testing.assert_close(logits(theirs), expected, **CLOSE)


def test_a_bias_of_b_has_no_place_where_there_is_none(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, BIASED)
    model = made(face, {"default": PLAIN})
    before = logits(model)
    with pytest.raises(AttachError, match="no place for it"):
        hotswap_adapter(model, folder, "default")
    assert torch.equal(logits(model), before)


def test_swapped_is_what_peft_swaps(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, {**PLAIN, "r": 2, "lora_alpha": 5})
    theirs, ours = both({"default": PLAIN})
    peft_prepare(theirs)
    peft_hotswap(theirs, str(folder), "default", torch_device="cpu")
    hotswap_adapter(ours, folder, "default", torch_device="cpu")
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)


@pytest.mark.parametrize("rank", [2, 4])
def test_dora_and_what_began_elsewhere(rank: int, tmp_path: Path) -> None:
    dora = {**PLAIN, "use_dora": True}
    folder, expected = saved(tmp_path / "dora", {**dora, "r": rank, "target_modules": ["q_proj"]})
    model = made(face, {"default": dora})
    hotswap_adapter(model, folder, "default")
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    base = tiny.llama(num_hidden_layers=2)
    method = f"lora(rank={rank}, init='pissa', targets=['q_proj', 'v_proj'])"
    adapter = shaken(tt.attach(base, method, "default"))
    with torch.no_grad():
        expected = base(input_ids=torch.arange(3, 19).reshape(2, 8)).logits
    adapter.save(tmp_path / "pissa")
    model = made(face, {"default": {**PLAIN, "r": 8}})
    hotswap_adapter(model, tmp_path / "pissa", "default")
    torch.testing.assert_close(logits(model), expected, **CLOSE)


@COMPILED
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_nothing_is_compiled_anew(other: dict[str, Any], tmp_path: Path) -> None:
    torch._dynamo.reset()
    folder, expected = saved(tmp_path, other)
    model = made(face, {"default": PLAIN})
    counting = Counting()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    first = logits(compiled)
    graphs = counting.graphs
    assert graphs == 1
    hotswap_adapter(compiled, folder, "default")
    torch.testing.assert_close(logits(compiled), expected, **CLOSE)
    assert not torch.allclose(first, expected, **CLOSE)
    assert counting.graphs == graphs


@COMPILED
def test_ranks_up_to_the_target(tmp_path: Path) -> None:
    torch._dynamo.reset()
    large = {**PLAIN, "r": 7, "lora_alpha": 5, "use_rslora": True}
    swaps = [saved(tmp_path / name, {**PLAIN, **large, "r": r}) for name, r in (("a", 7), ("b", 1))]
    model = made(face, {"default": {**PLAIN, "rank_pattern": {"v_proj": 2}}, "other": PLAIN})
    expected = [logits(model, name) for name in ("other", "default")]
    mine = face.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"])
    prepare_model_for_compiled_hotswap(model, target_rank=7, config=mine)
    assert (mine.r, mine.lora_alpha) == (7, 14)
    assert model.peft_config["default"].r == 7
    assert model.peft_config["default"].rank_pattern == {"v_proj": 7}
    for name, values in zip(("other", "default"), expected, strict=True):
        torch.testing.assert_close(logits(model, name), values, **CLOSE)
    counting = Counting()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected[1], **CLOSE)
    for folder, values in (*swaps, *swaps):
        hotswap_adapter(compiled, folder, "default")
        torch.testing.assert_close(logits(compiled), values, **CLOSE)
    assert counting.graphs == 1


def test_prepared_models_are_written_and_read(tmp_path: Path) -> None:
    model = made(face, {"default": {**PLAIN, "alpha_pattern": {"q_proj": 3}}})
    expected = logits(model)
    learnt = {n for n, p in model.named_parameters() if p.requires_grad}
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == learnt
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.alpha_pattern) == (6, 12, {"q_proj": 4.5})
    model.save_pretrained(tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, **CLOSE)


@pytest.mark.parametrize(
    "layers", ["['grouped', 'conv2', 'embed', 'head']", "['gate_up_proj', 'down_proj', 'q_proj']"]
)
def test_other_layers_have_room_too(layers: str, tmp_path: Path) -> None:
    make: Any = tiny.mixed if "grouped" in layers else tiny.mixtral
    key = "x" if "grouped" in layers else "input_ids"
    ids = torch.arange(3, 19).reshape(2, 8)

    @torch.no_grad()
    def run(model: nn.Module) -> Tensor:
        out = model(**{key: ids})
        return out if isinstance(out, Tensor) else out.logits

    other = make()
    shaken(tt.attach(other, f"lora(rank=6, alpha=3, targets={layers})", "a"), seed=5).save(
        tmp_path / "a"
    )
    model = make()
    shaken(tt.attach(model, f"lora(rank=4, targets={layers})", "a"))
    before = run(model)
    with pytest.raises(AttachError, match="target_rank=6"):
        hotswap_adapter(model, tmp_path / "a", "a")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(run(model), before, **CLOSE)
    hotswap_adapter(model, tmp_path / "a", "a")
    torch.testing.assert_close(run(model), run(other), **CLOSE)


def test_equal_methods_of_any_kind(tmp_path: Path) -> None:
    ids = torch.arange(3, 19).reshape(2, 8)
    other, model = tiny.llama(num_hidden_layers=1), tiny.llama(num_hidden_layers=1)
    shaken(tt.attach(other, "loha(rank=2)", "a"), seed=5).save(tmp_path / "a")
    shaken(tt.attach(model, "loha(rank=2)", "a"))
    hotswap_adapter(model, tmp_path / "a", "a")
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "larger": ({**PLAIN, "r": 5}, "room for 4"),
    "more layers": ({**PLAIN, "target_modules": ["q_proj", "v_proj", "o_proj"]}, "o_proj"),
    "dropout": ({**PLAIN, "lora_dropout": 0.1}, "other options"),
    "dora": ({**PLAIN, "use_dora": True}, "dora"),
}


@pytest.mark.parametrize(("config", "text"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_changes_nothing(
    config: dict[str, Any], text: str, tmp_path: Path
) -> None:
    folder, _ = saved(tmp_path, config)
    model = made(face, {"default": PLAIN})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = logits(model)
    with pytest.raises(AttachError, match=text):
        hotswap_adapter(model, folder, "default")
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(logits(model), expected)


def test_another_base_and_other_states(tmp_path: Path) -> None:
    torch.manual_seed(5)
    foreign = tiny.llama(num_hidden_layers=2)
    with torch.no_grad():
        foreign.lm_head.weight.add_(1)
    folder, _ = saved(tmp_path / "foreign", PLAIN, foreign)
    model = made(face, {"default": PLAIN})
    with pytest.raises(BaseMismatchError):
        hotswap_adapter(model, folder, "default")
    folder, _ = saved(tmp_path / "own", PLAIN)
    with pytest.raises(UnknownNameError):
        hotswap_adapter(model, folder, "other")
    model.merge_adapter()
    with pytest.raises(AttachError, match="unmerge"):
        hotswap_adapter(model, folder, "default")


@COMPILED
def test_preparing_comes_before_compiling() -> None:
    model = made(face, {"default": PLAIN})
    prepare_model_for_compiled_hotswap(model)  # nothing is needed for another alpha
    with pytest.raises(ConfigError, match="smaller than the rank 4"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(ConfigError, match="before the model is compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="compiled anew"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=9, check_compiled="ignore")
    with pytest.raises(ConfigError, match="'warn'"):
        prepare_model_for_compiled_hotswap(model, check_compiled="never")  # type: ignore[arg-type]
    with pytest.raises(AttachError, match="no LoRA"):
        other = tiny.llama(num_hidden_layers=1)
        tt.attach(other, "ia3", "a")
        prepare_model_for_compiled_hotswap(other, target_rank=4)
