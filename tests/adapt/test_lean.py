"""Forwards that keep little for backward: what they keep, and that nobody can tell them from the families' own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import trimtab as tt
from tests.adapt.test_interrupt import interrupt
from tests.engine import kit
from tests.tiny import CASES
from trimtab.adapt.lean import Lean, plainly
from trimtab.losses.promised import PromisedLogits

IDS = torch.arange(3, 259).view(2, 128) % 90


def adapted(dtype: torch.dtype = torch.float32, family: str = "llama") -> nn.Module:
    model = CASES[family].model(dtype).train()
    adapter = tt.attach(model, tt.LoRA(rank=2, targets="all-linear"), "a")
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            parameter.copy_(
                torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter) + number % 3 / 50
            )
    return model


def kinds(model: nn.Module) -> list[Any]:
    """What could be changed in a model: classes, attention."""
    config: Any = model.config
    return [*(type(module) for module in model.modules()), config._attn_implementation]


def learned(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [gradient for gradient in found if gradient is not None]


def same(one: list[Tensor], other: list[Tensor], within: float = 1e-4) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= within * a.norm()


# -- what is kept --------------------------------------------------------------------------------------


def test_a_step_keeps_little_more_than_half() -> None:
    """Beside the family's own code; what neither can spare (queries, keys, values, the loss) among it."""
    model = adapted(torch.bfloat16)
    with kit.noting(model) as kept:
        assert model(input_ids=IDS).logits.sum().requires_grad
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with plainly(), saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=IDS).logits.sum()
    assert loss.requires_grad
    assert 0 < sum(kept.values()) < 0.6 * sum(storages.values())


def test_a_loss_that_the_model_takes_makes_no_logits() -> None:
    model = adapted()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    got = learned(model)
    assert isinstance(out.logits, PromisedLogits) and out.logits._made is None
    with plainly():
        want = model(input_ids=IDS, labels=IDS)
    want.loss.backward()
    torch.testing.assert_close(out.loss, want.loss)
    same(learned(model), got)
    assert type(want.logits) is Tensor
    assert torch.equal(want.logits, out.logits.detach())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "llama-nf4", "t5"])
def test_losses_of_families(family: str) -> None:
    model = adapted(family=family)
    inputs = CASES[family].inputs()
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    inputs = {**inputs, "labels": inputs[key]}
    inputs.pop("decoder_input_ids", None)
    out = model(**inputs)
    out.loss.backward()
    got = learned(model)
    with plainly():
        want = model(**inputs)
    want.loss.backward()
    torch.testing.assert_close(out.loss, want.loss)
    same(learned(model), got, 1e-3)
    assert torch.equal(want.logits, out.logits.detach())


# -- nobody can tell -----------------------------------------------------------------------------------


def test_the_model_is_as_it_was() -> None:
    model = adapted()
    before, seen = kinds(model), []
    model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(kinds(model)))
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    training, answering = seen
    assert kinds(model) == before == answering != training
    assert [str(kind) for kind in training[:-1]] == [str(kind) for kind in before[:-1]]


def stop(*_: Any) -> None:
    raise KeyError("stop")


@pytest.mark.parametrize("error", [stop, interrupt])
def test_the_model_is_as_it_was_after_an_error(error: Callable[..., None]) -> None:
    model = adapted()
    before = kinds(model)
    hook = model.model.layers[1].register_forward_pre_hook(error)
    with pytest.raises((KeyError, KeyboardInterrupt)), tt.using(model, "a"):
        model(input_ids=IDS)
    hook.remove()
    assert kinds(model) == before
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_after_an_interrupt_without_a_scope_the_next_forward_puts_it_right() -> None:
    model = adapted()
    before = kinds(model)
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=IDS)
    hook.remove()
    with torch.no_grad():
        model(input_ids=IDS)
    assert kinds(model) == before
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_a_part_may_be_called_by_the_name_of_its_argument() -> None:
    model = kit.llama()
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    x = torch.randn(2, 3, 64, requires_grad=True)
    want = norm(hidden_states=x), mlp(x=x)
    with Lean(model):
        assert all(
            torch.equal(a, b) for a, b in zip((norm(hidden_states=x), mlp(x=x)), want, strict=True)
        )
        with torch.no_grad():
            assert torch.equal(norm(hidden_states=x), want[0])


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_on_a_gpu(family: str) -> None:
    """The same loss and gradients as by the family's code, everything kept or blocks recomputed, and less is kept."""
    model = adapted(family=family).cuda()
    before, ids = kinds(model), IDS.cuda()
    found, kept = [], []
    for way in (plainly, nullcontext, lambda: recomputed(model, reentrant=False)):
        out = None  # what the last way kept is gone
        start = torch.cuda.memory_allocated()
        with way():
            out = model(input_ids=ids, labels=ids)
        kept.append(torch.cuda.memory_allocated() - start)
        out.loss.backward()
        found.append((out.loss.detach(), learned(model)))
        assert kinds(model) == before
    assert isinstance(out.logits, PromisedLogits) and kept[1] < kept[0]
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=0)
        same(found[0][1], gradients, 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_in_bf16_gradients_are_as_near_as_by_the_familys_code(autocast: bool) -> None:
    wide = adapted().cuda()
    narrow = wide if autocast else copy.deepcopy(wide).bfloat16()
    ids, found = IDS.cuda(), []
    for model, way in ((wide, plainly), (narrow, plainly), (narrow, nullcontext)):
        with way(), torch.autocast("cuda", torch.bfloat16, enabled=autocast and bool(found)):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append(torch.cat([gradient.flatten().float() for gradient in learned(model)]))
    theirs, ours = (float((one - found[0]).norm()) for one in found[1:])
    assert ours < 1.5 * theirs


# -- beside what others do with a model ----------------------------------------------------------------


def gradients(model: nn.Module, around: Callable[[], AbstractContextManager[Any]]) -> list[Tensor]:
    with around():
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return learned(model)


@contextmanager
def recomputed(model: nn.Module, *, reentrant: bool) -> Iterator[None]:
    model.enable_input_require_grads()  # type: ignore[operator]
    model.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_are_recomputed(reentrant: bool, dtype: torch.dtype) -> None:
    """The recomputation sees what the forward saw."""
    model = adapted(dtype)
    before = kinds(model)
    want = gradients(model, nullcontext)
    got = gradients(model, lambda: recomputed(model, reentrant=reentrant))
    same(want, got, 1e-6 if dtype == torch.float32 else 0.05)
    assert kinds(model) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_whole_model(reentrant: bool) -> None:
    model = adapted()
    want = gradients(model, nullcontext)
    whole(model, reentrant).backward()  # type: ignore[no-untyped-call]
    same(want, learned(model), 1e-6)


def whole(model: nn.Module, reentrant: bool) -> Tensor:
    """The loss, of which nothing is kept."""

    def run(given: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=IDS, labels=IDS).loss
        return loss + 0 * given

    given = torch.zeros((), requires_grad=True)
    loss: Tensor = checkpoint(run, given, use_reentrant=reentrant)  # type: ignore[no-untyped-call]
    return loss


def dropping() -> nn.Module:
    """A model that drops attention and hidden states, with an adapter that drops what enters it."""
    model = CASES["gpt2"].model(torch.float32).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    adapter = tt.attach(model, tt.LoRA(rank=2, targets="all-linear", dropout=0.3), "a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return model


def test_dropout_draws_from_torch_s_seed_and_is_none_in_eval_mode() -> None:
    model, losses = dropping(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(model(input_ids=IDS, labels=IDS).loss.detach()))
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    lean = model(input_ids=IDS, labels=IDS).loss
    with plainly():
        plain = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(lean, plain)


def test_dropout_is_as_strong_as_the_family_s() -> None:
    """Means and spreads of the loss over many draws, by ours and by the family's own code."""
    model, ids = dropping(), IDS[:, :32]

    def losses(count: int = 120) -> Tensor:
        return torch.stack(
            [model(input_ids=ids, labels=ids).loss.detach() for _ in range(count)]
        ).double()

    torch.manual_seed(0)
    ours = losses()
    with plainly():
        theirs = losses()
    error = ((ours.var() + theirs.var()) / len(ours)).sqrt()
    assert abs(float(ours.mean() - theirs.mean())) < 4 * float(error)
    assert 0.7 < float(ours.std() / theirs.std()) < 1.4


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_was_dropped_is_dropped_again_when_it_is_recomputed(reentrant: bool) -> None:
    model = dropping()
    torch.manual_seed(0)
    want = gradients(model, nullcontext)
    torch.manual_seed(0)
    got = gradients(model, lambda: recomputed(model, reentrant=reentrant))
    same(want, got, 1e-5)
    model.activation_checkpointing_disable()  # type: ignore[operator]
    torch.manual_seed(0)
    whole(model, reentrant).backward()  # type: ignore[no-untyped-call]
    same(want, learned(model), 1e-5)


def test_whoever_keeps_what_a_graph_needs_goes_on_doing_so() -> None:
    model, seen = adapted(), []
    want = gradients(model, nullcontext)
    same(want, gradients(model, save_on_cpu), 1e-6)

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.shape)
        return tensor

    same(want, gradients(model, lambda: saved_tensors_hooks(pack, lambda tensor: tensor)), 1e-6)
    assert len(seen) > 10


def test_where_nobody_may_keep_anything() -> None:
    model = adapted()
    want = gradients(model, nullcontext)
    refused = torch.autograd.graph.disable_saved_tensors_hooks("not here")
    same(want, gradients(model, lambda: refused))


def test_gradients_of_gradients() -> None:
    """Of norms, MLPs and the loss; attention is eager, whose own can be taken."""
    found = []
    for way in (plainly, nullcontext):
        model = adapted()
        model.set_attn_implementation("eager")  # type: ignore[operator]
        trained = [p for p in model.parameters() if p.requires_grad]
        with way():
            loss = model(input_ids=IDS[:, :20], labels=IDS[:, :20]).loss
        first = torch.autograd.grad(loss, trained, create_graph=True)
        found.append(list(torch.autograd.grad(sum(g.square().sum() for g in first), trained)))
    same(*found, 1e-3)  # fp32: in fp64 they are the same to 1e-14


def test_transformed_by_functorch() -> None:
    model = adapted()
    want = gradients(model, nullcontext)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(
            model, values, (), {"input_ids": IDS, "labels": IDS}
        ).loss
        return found

    got = torch.func.grad(loss)(trained)
    same(want, list(got.values()))


def test_traced() -> None:
    model = adapted().eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Any:
            return self.model(input_ids=ids, use_cache=False).logits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Logits(), (IDS,), check_trace=False)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(IDS), model(input_ids=IDS).logits)
    assert "PythonOp" not in str(traced.inlined_graph)


def test_watched_parts_are_seen() -> None:
    """Hooks and captured outputs see what they see of the family's own code."""
    model = adapted()
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("mlp", "act_fn", "norm", "layernorm", "lm_head", "self_attn")):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.setdefault(name, []).append(
                    (out[0] if isinstance(out, tuple) else out).detach() * 1
                )
            )
    for way in (plainly, nullcontext):
        with way():
            model(input_ids=IDS, labels=IDS, output_hidden_states=True).loss.backward()
    assert len(seen) > 8
    for name, (first, second) in seen.items():
        assert torch.equal(first, second), name
