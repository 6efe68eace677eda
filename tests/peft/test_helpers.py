"""Helpers: scales of layers and models, signatures, preparing models; against PEFT's where those are right."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.helpers import find_kappa_target_modules as peft_kappa
from peft.helpers import rescale_adapter_scale as peft_rescale
from torch import nn

import trimtab as tt
import trimtab.peft as face
from tests import tiny
from tests.laws.cells import shaken
from tests.peft.kit import IDS, both, logits, made, quiet
from trimtab.errors import (
    AttachError,
    ConfigError,
    FileFormatError,
    ModelError,
    TargetError,
    UnknownNameError,
)
from trimtab.peft.helpers import (
    DoraCaching,
    check_if_peft_model,
    disable_input_dtype_casting,
    find_kappa_target_modules,
    rescale_adapter_scale,
    update_forward_signature,
    update_generate_signature,
    update_signature,
)
from trimtab.peft.utils import (
    cast_mixed_precision_params,
    infer_device,
    prepare_model_for_kbit_training,
    shift_tokens_right,
)

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


# -- scales -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [0, 0.5, -1.5])
@pytest.mark.parametrize("option", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_rescaling_is_pefts(multiplier: float, option: dict[str, Any]) -> None:
    theirs, ours = both({"default": {**PLAIN, **option}})
    before = logits(ours)
    with peft_rescale(theirs, multiplier):
        expected = logits(theirs)
    with rescale_adapter_scale(ours, multiplier):
        scaled = logits(ours)
    if "use_dora" not in option:  # PEFT scales inside the norm, we scale the whole edit
        torch.testing.assert_close(scaled, expected, **CLOSE)
    with ours.disable_adapter():
        bare = logits(ours)
    assert bool(multiplier) or torch.equal(scaled, bare)
    assert torch.equal(logits(ours), before)
    assert ours.base_model.bank.scales == {}


@pytest.mark.parametrize("method", ["loha(rank=2)", "ia3", "bottleneck(size=4)", "bitfit"])
def test_rescaling_is_for_every_method(method: str) -> None:
    model = tiny.bert()
    shaken(tt.attach(model, method, "a"))
    tt.scale(model, "a", 2.0)
    batch = {"input_ids": IDS}
    with torch.no_grad():
        twice = model(**batch).logits
        with rescale_adapter_scale(model, 0.0):
            nothing = model(**batch).logits
        with tt.using(model, None):
            assert torch.equal(nothing, model(**batch).logits)
        with rescale_adapter_scale(model, 0.5):
            once = model(**batch).logits
        assert torch.equal(twice, model(**batch).logits)
        tt.scale(model, "a", 1.0)
        assert torch.equal(once, model(**batch).logits)


def test_rescaling_merged_weights() -> None:
    """PEFT leaves merged weights as they are, and says nothing."""
    model = made(face, {"default": PLAIN})
    before = logits(model)
    with rescale_adapter_scale(model, 0.5):
        expected = logits(model)
    model.merge_adapter()
    with rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(logits(model), expected, **CLOSE)
    torch.testing.assert_close(logits(model), before, **CLOSE)


def test_rescaling_ends_with_an_error_too() -> None:
    model = made(face, {"default": PLAIN})
    before = logits(model)
    with pytest.raises(RuntimeError, match="mine"), rescale_adapter_scale(model, 3.0):
        raise RuntimeError("mine")
    assert torch.equal(logits(model), before)


def test_rescaling_what_has_no_scale() -> None:
    with pytest.raises(AttachError), rescale_adapter_scale(tiny.llama(num_hidden_layers=1), 1.0):
        pass
    model = made(face, {"default": PLAIN})
    for wrong in ("0.5", None, float("inf")):
        with pytest.raises(ConfigError), rescale_adapter_scale(model, wrong):  # type: ignore[arg-type]
            pass
    prompted = tiny.llama(num_hidden_layers=1)
    tt.attach(prompted, "prefix(length=2)", "a")
    with pytest.raises(TargetError, match="virtual"), rescale_adapter_scale(prompted, 0.5):
        pass


@pytest.mark.parametrize(
    "steps",
    [
        [("set_scale", ("default", 0.5))],
        [("set_scale", ("other", 0.0))],
        [("scale_layer", (3.0,)), ("scale_layer", (0.5,))],
        [("scale_layer", (3.0,)), ("unscale_layer", (2.0,))],
        [("scale_layer", (3.0,)), ("unscale_layer", ())],
        [("scale_layer", (3.0,)), ("set_scale", ("default", 2.0))],
        [("set_scale", ("nobody", 2.0))],
    ],
)
@pytest.mark.parametrize("which", ["q_proj", "proj"])
def test_scales_of_layers_are_pefts(which: str, steps: list[tuple[str, tuple[Any, ...]]]) -> None:
    theirs, ours = both({"default": PLAIN, "other": {**PLAIN, "use_rslora": True}})
    for model in (theirs, ours):
        with quiet():
            model.base_model.set_adapter(["default", "other"])
        for name, module in model.named_modules():
            if name.endswith(which) and hasattr(module, "set_scale"):
                for step, given in steps:
                    getattr(module, step)(*given)
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
    for name, module in theirs.named_modules():
        if hasattr(module, "set_scale"):
            own = dict(ours.get_submodule(name).scaling)
            assert own == pytest.approx(dict(module.scaling))


def test_scaling_is_written_to_as_in_peft() -> None:
    theirs, ours = both({"default": PLAIN})
    for model in (theirs, ours):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.scaling["default"] *= 0.25
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
    layer = next(m for m in ours.modules() if hasattr(m, "set_scale"))
    assert repr(layer.scaling) == "{'default': 0.5}"
    assert len(layer.scaling) == 1
    with pytest.raises(UnknownNameError):
        layer.scaling["nobody"] = 1.0
    with pytest.raises(ConfigError):
        del layer.scaling["default"]
    with pytest.raises(AttributeError):
        layer.scaling = {"default": 1.0}
    for wrong in (float("nan"), "1"):
        with pytest.raises(ConfigError):
            layer.set_scale("default", wrong)
    with pytest.raises(ConfigError):
        layer.unscale_layer(0)


def test_a_scaled_layer_is_merged_and_unmerged() -> None:
    model = made(face, {"default": PLAIN})
    layer = next(m for m in model.modules() if hasattr(m, "set_scale"))
    layer.set_scale("default", 0.5)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    layer.set_scale("default", 1.0)  # the merged weight of this layer is of no use any more
    model2 = made(face, {"default": PLAIN})
    torch.testing.assert_close(logits(model), logits(model2), **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), logits(model2), **CLOSE)


def test_a_head_has_no_scale() -> None:
    config = {**PLAIN, "modules_to_save": ["score"]}
    theirs, ours = both({"default": config}, base=tiny.llama_classifier)
    for model in (theirs, ours):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 0.5)
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)


def test_casting_and_caching_change_nothing() -> None:
    model = made(face, {"default": {**PLAIN, "use_dora": True}})
    expected = logits(model)
    with disable_input_dtype_casting(model), DoraCaching():
        assert torch.equal(logits(model), expected)
    switch = DoraCaching()
    switch(enabled=False)
    assert not switch.enabled
    assert torch.equal(logits(model), expected)


# -- signatures and files -----------------------------------------------------------------------------


def test_signatures_are_those_of_the_model_inside() -> None:
    model = made(face, {"default": PLAIN})
    expected = logits(model)
    base = model.get_base_model()
    update_forward_signature(model)
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    assert torch.equal(logits(model), expected)
    update_generate_signature(model)
    assert inspect.signature(model.generate) == inspect.signature(base.generate)
    assert model.generate.__doc__ == base.generate.__doc__
    with model.disable_adapter():
        assert not torch.equal(logits(model), expected)
    update_signature(model)
    with torch.no_grad():
        routed = model(input_ids=IDS, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(routed[1], expected[1], **CLOSE)
    with pytest.raises(ConfigError, match="'forward'"):
        update_signature(model, "both")  # type: ignore[arg-type]


def test_what_is_an_adapter(tmp_path: Path) -> None:
    made(face, {"default": PLAIN}).save_pretrained(tmp_path / "adapter")
    (tmp_path / "other").mkdir()
    assert check_if_peft_model(tmp_path / "adapter")
    assert not check_if_peft_model(tmp_path / "other")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "adapter_config.json").write_text('{"peft_type": "OF_TOMORROW"}')
    assert check_if_peft_model(tmp_path / "new")
    assert not check_if_peft_model("no such/name of a/repository")
    assert issubclass(FileFormatError, ValueError)


# -- preparing ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_plain_model_is_not_converted(reentrant: bool | None) -> None:
    """S22: PEFT makes all of a bf16 model fp32."""
    model = tiny.llama(num_hidden_layers=2).to(torch.bfloat16).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    options = None if reentrant is None else {"use_reentrant": reentrant}
    assert prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options) is model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad
    assert model.is_gradient_checkpointing
    with quiet():
        wrapped = face.get_peft_model(model, face.LoraConfig(**PLAIN))
    loss = wrapped(input_ids=IDS, labels=IDS).loss
    loss.backward()
    learnt = [p for p in wrapped.parameters() if p.requires_grad]
    assert learnt
    assert all(p.grad is not None and p.dtype == torch.float32 for p in learnt)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_quantised_weights_stay_as_they_are() -> None:
    model = tiny.llama(num_hidden_layers=1).to(torch.float16)
    packed = nn.Parameter(torch.arange(-4, 4, dtype=torch.int8), requires_grad=False)
    model.lm_head.register_parameter("packed", packed)
    prepare_model_for_kbit_training(model)
    cast_mixed_precision_params(model, torch.bfloat16)
    assert model.lm_head.packed is packed
    assert packed.dtype == torch.int8
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_preparing_without_checkpoints() -> None:
    model = tiny.llama(num_hidden_layers=1)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert not model.is_gradient_checkpointing
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ModelError, match="Sequential"):
        prepare_model_for_kbit_training(nn.Sequential(nn.Linear(2, 2)))


def test_mixed_precision_casts_the_base_and_keeps_adapters() -> None:
    model = made(face, {"default": PLAIN, "other": PLAIN})
    expected = logits(model, "other")
    model.set_adapter("default")
    cast_mixed_precision_params(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    torch.testing.assert_close(logits(model, "other").float(), expected, atol=0.05, rtol=0.1)
    with pytest.raises(ConfigError, match="dtype"):
        cast_mixed_precision_params(model, torch.int8)


def test_shifted_tokens_are_pefts() -> None:
    labels = torch.tensor([[5, 6, -100, 8], [9, -100, -100, 3]])
    expected = peft.shift_tokens_right(labels, 1, 2)
    assert torch.equal(shift_tokens_right(labels, 1, 2), expected)
    with pytest.raises(ConfigError, match="pad_token_id"):
        shift_tokens_right(labels, None, 2)  # type: ignore[arg-type]


def test_the_device_is_pefts() -> None:
    assert infer_device() == peft.utils.infer_device()


@pytest.mark.parametrize("top", [0.2, 1.0])
def test_condition_numbers_choose_as_peft_does(top: float) -> None:
    for make in (lambda: tiny.llama(num_hidden_layers=2), tiny.mixtral):
        model: Any = make()
        expected = peft_kappa(model, top_p=top, show_progress=False)
        assert find_kappa_target_modules(model, top_p=top, show_progress=False) == expected
        shaken(tt.attach(model, "lora(rank=2)", "a"))
        assert find_kappa_target_modules(model, top_p=top, show_progress=False) == expected
    with pytest.raises(ConfigError, match="share"):
        find_kappa_target_modules(tiny.llama(num_hidden_layers=1), top_p=0.0)


def test_paths_that_users_import() -> None:
    import trimtab.peft.utils as utils
    from trimtab.peft.utils import other, save_and_load

    assert utils.prepare_model_for_kbit_training is other.prepare_model_for_kbit_training
    assert face.prepare_model_for_kbit_training is other.prepare_model_for_kbit_training
    assert utils.PeftType is face.PeftType
    assert "shift_tokens_right" in dir(utils)
    for module in (utils, save_and_load):
        with pytest.raises(AttributeError, match="nothing_like_it"):
            module.nothing_like_it  # noqa: B018
