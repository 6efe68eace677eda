"""ReFT: which positions it edits, and its algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from tests.laws.cells import shaken
from tests.tiny import CASES, output
from trimtab.adapt.bank import Plan, bank_of
from trimtab.adapt.route import Route, Span
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.errors import ConfigError, RouteError, UnsupportedError
from trimtab.methods.loreft import orthonormal
from trimtab.optim.params import AdamParams

BLOCK = "model.layers.1"
KINDS = pytest.mark.parametrize("kind", ["loreft", "direft", "noreft"])


def changed(model: nn.Module, **inputs: Tensor) -> Tensor:
    """(B, T): where the output of the edited block differs from the bare one's, exactly."""
    found: list[Tensor] = []
    handle = model.get_submodule(BLOCK).register_forward_hook(
        lambda m, a, y: found.append(y[0] if isinstance(y, tuple) else y)
    )
    with torch.no_grad():
        model(**inputs, use_cache=False)
        with tt.using(model, None):
            model(**inputs, use_cache=False)
    handle.remove()
    return (found[0] != found[1]).any(-1)


def llama(method: str) -> nn.Module:
    model = tiny.llama().double()
    shaken(tt.attach(model, f"{method[:-1]}, targets='{BLOCK}')", "a"))
    return model


@KINDS
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_chosen_positions_change(kind: str, tied: bool) -> None:
    model = llama(f"{kind}(rank=2, first=2, last=1, tied={tied})")
    ids = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padded on the left
    mask[2, -2:] = 0  # padded on the right
    expected = torch.zeros(3, 7, dtype=torch.bool)
    expected[0, [0, 1, 6]] = expected[1, [3, 4, 6]] = expected[2, [0, 1, 4]] = True
    assert torch.equal(changed(model, input_ids=ids, attention_mask=mask), expected)


@KINDS
def test_the_prompt_ends_where_the_labels_begin(kind: str) -> None:
    model = llama(f"{kind}(rank=2, first=1, last=2)")
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = labels[1, :3] = -100
    expected = torch.zeros(2, 8, dtype=torch.bool)
    expected[0, [0, 3, 4]] = expected[1, [0, 1, 2]] = True
    assert torch.equal(changed(model, input_ids=ids, labels=labels), expected)


def test_each_packed_document_has_its_own_prompt() -> None:
    model = llama("loreft(rank=2, first=1, last=1)")
    ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 0]]).bool()
    bank, spans = bank_of(model), (Span(0, 0, 5), Span(0, 5, 9))
    outs: list[Tensor] = []
    model.get_submodule(BLOCK).register_forward_hook(
        lambda m, a, y: outs.append(y[0] if isinstance(y, tuple) else y)
    )
    for owners in ((("a",), ("a",)), (("a",), ()), ((), ())):
        with bank.scope(Route(owners, spans), Plan(prompt=prompt)), torch.no_grad():
            model(ids, use_cache=False)
    both, one = (out != outs[2] for out in outs[:2])
    assert both.any(-1)[0].nonzero().flatten().tolist() == [0, 2, 5, 7]
    assert one.any(-1)[0].nonzero().flatten().tolist() == [0, 2]


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_in_a_short_prompt_each_position_belongs_to_the_nearer_end(length: int) -> None:
    """Nothing is edited twice, which the sum of the two ends' edits would be."""
    model = tiny.llama().double()
    adapter = shaken(tt.attach(model, f"direft(rank=2, first=3, last=3, targets='{BLOCK}')", "a"))
    ids = torch.arange(3, 3 + length)[None]
    base, edited = [], []
    for name, into in ((None, base), ("a", edited)):
        handle = model.get_submodule(BLOCK).register_forward_hook(
            lambda m, a, y, into=into: into.append(y[0] if isinstance(y, tuple) else y)
        )
        with tt.using(model, name), torch.no_grad():
            model(ids, use_cache=False)
        handle.remove()
    p = {key: tensor.double() for key, tensor in adapter.at_site(BLOCK).items()}
    for position in range(length):
        end = "first" if position < length - 1 - position else "last"
        h = base[0][0, position]
        change = (p[f"reft_{end}_source"] @ h + p[f"reft_{end}_b"]) @ p[f"reft_{end}_basis"]
        assert torch.allclose(edited[0][0, position], h + change)


@torch.no_grad()
def test_only_the_prompt_of_a_generation_is_edited() -> None:
    """A later step is that of the bare base on the same cache."""
    model = CASES["llama"].model()
    shaken(tt.attach(model, "loreft(rank=2, first=2, last=2)", "a"))
    ids = torch.arange(3, 9)[None]
    steps = []
    for name in ("a", None):
        with tt.using(model, "a"):
            cache = model(ids, use_cache=True).past_key_values
        with tt.using(model, name):
            steps.append(model(ids[:, :1], past_key_values=cache, use_cache=True).logits)
    assert torch.equal(*steps)


@torch.no_grad()
def test_a_cache_that_began_without_it_is_refused() -> None:
    model = CASES["llama"].model()
    tt.attach(model, "loreft(rank=2)", "a")
    ids = torch.arange(3, 9)[None]
    with tt.using(model, None):
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(RouteError, match="without it"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_training_a_causal_model_needs_to_know_the_prompt() -> None:
    model = tiny.llama().train()
    tt.attach(model, "loreft(rank=2)", "a")
    with pytest.raises(RouteError, match="prompt"):
        model(torch.arange(3, 9)[None])


def test_an_encoder_decoder_model_is_edited_in_its_encoder() -> None:
    model = tiny.t5()
    adapter = tt.attach(model, "loreft(rank=2)", "a")
    assert {site.path for site in adapter.sites} == {"encoder.block.0", "encoder.block.1"}
    with pytest.raises(UnsupportedError, match="encoder"):
        tt.attach(model, "loreft(rank=2, targets='decoder.block.0')", "b")


def test_it_must_act_somewhere_in_a_subspace() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        tt.LoReFT(first=0, last=0)
    with pytest.raises(UnsupportedError, match="no 40 directions"):
        tt.attach(tiny.llama(), tt.LoReFT(rank=40), "a")


def test_what_has_no_positions_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="expert"):
        tt.attach(tiny.mixtral(), tt.LoReFT(rank=2, targets="experts.down_proj"), "a")
    with pytest.raises(UnsupportedError, match="convolution"):
        tt.attach(tiny.mixed(), tt.DiReFT(rank=2, targets="conv1"), "a")


TRAINED = [
    "loreft(rank=4)", "direft(rank=4)", "noreft(rank=4, tied=True)", "pfeiffer", "fusion", "parallel",
    "compacter(size=8)", "adapterplus",
]  # fmt: skip


@pytest.mark.parametrize("method", TRAINED)
def test_the_engine_trains_it(method: str) -> None:
    """With the prompt told by the data, and a fusion's own loss added to the objective."""
    model = tiny.llama()
    adapter = tt.attach(model, method, "a")
    for name, tensor in adapter.named().items():
        if name in adapter.fixed:  # parts that were trained to do something
            tensor.normal_(generator=torch.Generator().manual_seed(len(name.slot)))
    engine = Engine(model)
    data = [
        Datum.causal([3, 4, 5, 6, 7], [0, 0, 1, 1, 1]),
        Datum.causal([8, 9, 10, 11], [0, 0, 1, 1]),
    ]
    losses = []
    for _ in range(12):
        result = engine.forward_backward(data, "a")
        losses.append(result.mean)
        assert list(result.auxiliary) == (["a.value"] if method == "fusion" else [])
        engine.optim_step("a", AdamParams(lr=0.02))
    assert losses[-1] < losses[0] - 0.1
    if method.startswith("loreft"):  # what a file would hold is orthonormal
        for key, tensor in adapter.tensors.items():
            if key.endswith("basis"):
                assert (tensor @ tensor.T - torch.eye(4)).abs().max() < 1e-5


# -- the subspace ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_basis_stays_orthonormal_whatever_a_step_does(dtype: torch.dtype) -> None:
    model = tiny.bert().to(dtype)
    adapter = tt.attach(model, "loreft(rank=4)", "a")
    first = {k: t.clone() for k, t in adapter.tensors.items() if k.endswith("basis")}
    assert all((orthonormal(t) - t).abs().max() < 1e-6 for t in first.values())
    optimiser = torch.optim.Adam(adapter.parameters(), lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        output(model, CASES["bert"].inputs()).float().square().sum().backward()
        optimiser.step()
    for key, tensor in adapter.tensors.items():
        if key.endswith("basis"):
            basis = orthonormal(tensor.detach())
            assert (basis @ basis.T - torch.eye(4)).abs().max() < 1e-5
            assert "layer.1" in key or (tensor - first[key]).abs().max() > 0.1


def test_the_gradient_through_the_basis_is_right() -> None:
    rows = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormal, (rows,))


@torch.no_grad()
def test_a_source_equal_to_the_basis_is_the_identity() -> None:
    case = CASES["llama"]
    model, inputs = case.model(), case.inputs()
    base = output(model, inputs)
    adapter = tt.attach(model, "loreft(rank=3)", "a")
    for name, tensor in adapter.named().items():
        end = name.slot.split("_")[1]
        if name.slot.endswith("source"):
            tensor.copy_(orthonormal(adapter.at_site(name.path)[f"reft_{end}_basis"]))
        elif name.slot.endswith("_b"):
            tensor.zero_()
    assert (output(model, inputs) - base).abs().max() < 1e-5
