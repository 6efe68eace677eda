"""Gates: forced open they are the inner method, forced closed the base; and what each of them decides from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from tests.laws.cells import shaken
from tests.laws.test_laws import recompute_blocks
from trimtab.adapt.bank import bank_of
from trimtab.adapt.gating import straight_through
from trimtab.adapt.recurrent import lstm
from trimtab.errors import ConfigError, TrimtabError, UnsupportedError

IDS = {"input_ids": torch.randint(3, 90, (4, 8), generator=torch.Generator().manual_seed(0))}
LABELS = {"labels": torch.cat([torch.full((4, 4), -100), IDS["input_ids"][:, 4:]], 1)}
INNER = [
    "lora(rank=4)",
    "ia3",
    "bitfit",
    "bottleneck(size=6)",
    "dora(rank=4)",
    "full(targets='mlp_down')",
]
OF_OUTPUTS = [text for text in INNER if text != "ia3"]
HARD = [f"spottune(inner={inner}, hidden=8)" for inner in INNER] + [
    f"adafit(inner={inner}, group_size=4, width=6, scope={scope}, reads={'lowrank' if 'ra(' in inner else 'input'})"
    for inner in OF_OUTPUTS
    for scope in (("sequence", "token", "static") if "lora" in inner else ("sequence",))
]
EVERY = [*HARD, *(f"gated(inner={inner})" for inner in INNER)]


def attached(
    text: str, model: nn.Module | None = None, name: str = "a"
) -> tuple[nn.Module, tt.Adapter]:
    model = tiny.llama() if model is None else model
    return model, shaken(tt.attach(model, tt.method(text), name))


def force(adapter: tt.Adapter, logit: float) -> None:
    """Gates that are open (a large logit) or closed, whatever they read."""
    with torch.no_grad():
        for key, tensor in adapter.tensors.items():
            if key.endswith(("policy.up.weight", "gate.write.weight", "gate.weight")):
                tensor.zero_()
            elif key.endswith("policy.up.bias"):
                tensor.copy_(torch.tensor([0.0, logit]).repeat(len(tensor) // 2))
            elif key.endswith(("gate.write.bias", "gate.logit", "gate.bias")):
                tensor.fill_(logit)


def inner_alone(adapter: tt.Adapter) -> nn.Module:
    model = tiny.llama()
    alone = tt.attach(model, adapter.method.inner, "a")  # type: ignore[attr-defined]
    with torch.no_grad():
        for key, tensor in alone.tensors.items():
            tensor.copy_(adapter.tensors[key])
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("text", EVERY)
@torch.no_grad()
def test_open_gates_are_the_inner_method_and_closed_ones_the_base(
    text: str, training: bool
) -> None:
    model, adapter = attached(text)
    inputs = {**IDS, **LABELS}
    if training:
        model.train()
    for logit, expected in ((1e4, inner_alone(adapter)), (-1e4, tiny.llama())):
        force(adapter, logit)
        assert torch.equal(tiny.output(model, inputs), tiny.output(expected, inputs)), logit


@pytest.mark.parametrize("text", [t for t in EVERY if "static" not in t and "lora" in t])
@torch.no_grad()
def test_rows_decide_each_for_itself(text: str) -> None:
    model, adapter = attached(text)
    with torch.no_grad():
        for key, tensor in adapter.tensors.items():
            if "policy.up" in key or "gate.write" in key:
                tensor.copy_(
                    torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)) * 3
                )
    whole = tiny.output(model, IDS)
    assert torch.equal(whole, tiny.output(model, IDS)), "evaluation repeats itself"
    order = torch.tensor([2, 0, 3, 1])
    turned = tiny.output(model, {"input_ids": IDS["input_ids"][order]})
    torch.testing.assert_close(turned, whole[order])
    torch.testing.assert_close(tiny.output(model, {"input_ids": IDS["input_ids"][1:2]}), whole[1:2])


def test_the_gradient_passes_straight_through() -> None:
    soft = torch.tensor([0.2, 0.51, 0.9], requires_grad=True)
    hard = straight_through(soft)
    assert hard.tolist() == [0.0, 1.0, 1.0]
    hard.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert soft.grad is not None and soft.grad.tolist() == [1.0, 2.0, 3.0]


# -- SpotTune -----------------------------------------------------------------------------------------


def policy(hidden: int = 8, **options: Any) -> tuple[nn.Module, tt.Adapter]:
    model = tiny.llama()
    adapter = shaken(
        tt.attach(model, tt.SpotTune(inner="lora(rank=4)", hidden=hidden, **options), "a")
    )
    return model, adapter


def chosen(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The gates (rows, blocks) of one forward."""
    model(**inputs, use_cache=False)
    memory = bank_of(model)._last.memory  # type: ignore[union-attr]
    gates: Tensor = memory["a", ("a",), "policy"]
    return gates


@torch.no_grad()
def test_how_often_a_block_is_adapted_is_the_softmax_whatever_the_temperature() -> None:
    logits = torch.tensor([0.3, 1.1])
    rows = torch.full((100_000, 2), 5)
    for temperature in (1.0, 5.0):
        model, adapter = policy(temperature=temperature)
        force(adapter, 0.0)
        adapter.tensors["policy.up.bias"].copy_(logits.repeat(3))
        model.train()
        embedding = model.model.embed_tokens
        with tt.using(model, "a"):
            context = bank_of(model)._open(
                model, (), {"input_ids": rows, "labels": torch.full_like(rows, -100)}
            )
            bank_of(model)._context = context
            embedding(rows)
            bank_of(model)._context = None
        share = context.memory["a", ("a",), "policy"].mean(0)
        torch.testing.assert_close(share, logits.softmax(0)[1].expand(3), atol=0.01, rtol=0)


def test_the_policys_gradient_is_the_jacobian_of_the_softmax_at_its_temperature() -> None:
    model, adapter = policy(temperature=2.0)
    force(adapter, 0.7)
    model.train()
    bias = adapter.tensors["policy.up.bias"]
    torch.manual_seed(11)
    gates = chosen(model, {**IDS, **LABELS})
    weight = torch.linspace(-1, 2, gates.numel()).view_as(gates)
    (found,) = torch.autograd.grad((gates * weight).sum(), bias)
    torch.manual_seed(11)
    noise = -torch.empty(4, 3, 2).exponential_().log()
    p = ((torch.tensor([0.0, 0.7]) + noise) / 2.0).softmax(-1)
    slope = (weight * p[..., 0] * p[..., 1] / 2.0).sum(0)
    torch.testing.assert_close(found, torch.stack([-slope, slope], 1).flatten())
    assert set(gates.unique().tolist()) <= {0.0, 1.0}


def test_evaluation_draws_no_noise_and_the_policy_has_two_logits_a_block() -> None:
    """Two faults of the official code: noise at evaluation, and a head of L outputs in place of 2 L."""
    model, adapter = policy()
    force(adapter, 0.01)  # a coin toss in training
    assert adapter.tensors["policy.up.weight"].shape == (2 * 3, 8)
    state = torch.get_rng_state()
    assert torch.equal(chosen(model, IDS), torch.ones(4, 3))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    torch.manual_seed(0)
    assert 0 < float(chosen(model, {**IDS, **LABELS}).detach().mean()) < 1


def test_both_paths_read_the_same_input_and_running_statistics_stay() -> None:
    """Another fault: the frozen path was given what the adapted one had changed; and its norms went on training."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny.llama()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.norm(self.model(**inputs, use_cache=False).logits)

    whole = Blocks()
    adapter = shaken(tt.attach(whole.model, tt.SpotTune(inner="lora(rank=4)", hidden=8), "a"))
    tt.attach(whole.model, tt.BitFit(), "b")
    whole.train()
    force(adapter, -1e4)
    base = tiny.llama()
    assert torch.equal(whole.model(**IDS, **LABELS).logits, base(**IDS).logits)
    resnet = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)).eval()
    tt.attach(resnet, tt.method("gated(inner=lora(rank=2, targets='0'))"), "g")
    before = {key: value.clone() for key, value in resnet.state_dict().items() if "running" in key}
    resnet.train()(torch.randn(5, 3, 9))
    assert all(torch.equal(resnet.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    "inner", ["lora(rank=4)", "ia3", "bottleneck(size=4)", "lora(rank=4, layers=[0, -1])"]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_settled_is_the_inner_method_in_the_blocks_used_most(inner: str, tmp_path: Any) -> None:
    model = tiny.llama()
    adapter = shaken(
        tt.attach(model, tt.method(f"spottune(inner={inner}, hidden=8, blocks=1)"), "a")
    )
    with torch.no_grad():
        adapter.tensors["policy.usage"].copy_(torch.tensor([0.2, 0.9, 0.6]))
    settled = tt.settled(model, "a", to="b")
    kept = 2 if "layers" in inner else 1
    assert settled.method.layers == (kept,) and settled.method.kind == inner.partition("(")[0]
    with torch.no_grad():
        for key in ("policy.up.weight", "policy.up.bias"):
            adapter.tensors[key].zero_()
        adapter.tensors["policy.up.bias"][2 * kept + 1] = 5.0
    expected = tiny.output(model, IDS)
    other = tiny.llama()
    tt.attach(other, settled)
    torch.testing.assert_close(tiny.output(other, IDS), expected)
    settled = tt.detach(other, "b")
    settled.save(tmp_path / "b")
    if settled.method.affine:
        tt.attach(other, tt.Adapter.load(tmp_path / "b"))
        torch.testing.assert_close(tiny.output(tt.merge(other, "b"), IDS), expected)
    if inner.startswith("lora"):
        peft = pytest.importorskip("peft")
        theirs = peft.PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "b"))
        torch.testing.assert_close(theirs(**IDS).logits, expected)
    with pytest.raises(UnsupportedError, match="no gates"):
        tt.settled(attached("lora")[0], "a")


def test_usage_is_a_running_average_and_the_budget_lowers_it() -> None:
    model, adapter = policy(blocks=1, budget_weight=5.0, temperature=1.0)
    force(adapter, 2.0)
    model.train()
    named = {
        k: p for k, p in adapter.tensors.items() if "policy" in k and isinstance(p, nn.Parameter)
    }
    optimiser = torch.optim.Adam(named.values(), lr=0.3)
    torch.manual_seed(0)
    for _ in range(40):
        chosen(model, {**IDS, **LABELS})
        optimiser.zero_grad()
        sum(value for _, _, value in bank_of(model).take_losses()).backward()  # type: ignore[union-attr]
        optimiser.step()
    model.eval()
    assert float(chosen(model, IDS).sum(1).mean()) <= 1.0
    usage = adapter.tensors["policy.usage"]
    assert not usage.requires_grad and 0 < float(usage.min()) < 1 and "policy.usage" not in named
    assert adapter.method.settled({"gate_usage": usage}).layers is not None


def test_the_decision_is_of_each_owner_where_a_stack_shares_the_batch() -> None:
    model, _ = attached("spottune(inner=lora(rank=4), hidden=8)")
    attached("bitfit", model, "b")
    with tt.rows(model, ["a", ("a", "b"), None, ("b", "a")]):
        together = tiny.output(model, IDS)
    for row, who in enumerate(("a", ("a", "b"), None, ("b", "a"))):
        with tt.using(model, who):
            alone = tiny.output(model, {"input_ids": IDS["input_ids"][[row]]})
        torch.testing.assert_close(together[row : row + 1], alone)


# -- UniPELT ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_soft_gate_is_the_mean_of_sigmoids_over_the_prompt_and_keeps_loras_scaling() -> None:
    """The reference code drops alpha / rank where a gate is on."""
    layer = nn.Sequential(nn.Linear(6, 5))
    adapter = shaken(
        tt.attach(layer, tt.method("gated(inner=lora(rank=2, alpha=6, targets='0'))"), "a")
    )
    t = {key.removeprefix("0."): value for key, value in adapter.tensors.items()}
    x = torch.randn(3, 4, 6)
    gate = torch.sigmoid(F.linear(x, t["gate.weight"], t["gate.bias"])).mean(1, keepdim=True)
    change = 3.0 * F.linear(F.linear(x, t["lora_A.weight"]), t["lora_B.weight"])
    base = layer[0].base_layer(x)
    torch.testing.assert_close(layer(x), base + gate * change)


@torch.no_grad()
@pytest.mark.parametrize("logit", [30.0, 0.0])
def test_a_gated_prefix_has_its_keys_and_values_scaled(logit: float) -> None:
    """UniPELT's: an open gate is the prefix, a half-open one the prefix with half its table."""
    model, adapter = attached("gated(inner=prefix(length=3, init_std=1.0))")
    force(adapter, logit)
    other, plain = attached("prefix(length=3, init_std=1.0)")
    gate = torch.sigmoid(torch.tensor(logit))
    (table,) = plain.parameters()
    table.copy_(adapter.tensors["prompt_encoder.embedding.weight"] * gate)
    torch.testing.assert_close(tiny.output(model, IDS), tiny.output(other, IDS))


@pytest.mark.parametrize(("name", "kinds"), [
    ("unipelt", ["gated", "gated", "gated"]), ("mam", ["prefix", "parallel"]),
])  # fmt: skip
def test_unions_with_a_name_train_and_answer_row_by_row(name: str, kinds: list[str]) -> None:
    model = tiny.llama()
    adapter = tt.attach(model, tt.method(name), "a")
    assert [method.kind for method in adapter.methods] == kinds
    shaken(adapter, 0.05)
    with tt.rows(model, ["a", None, "a", None]):
        out = model(**IDS, **LABELS).logits
        (out.sum() / 1e3).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in adapter.parameters())
    model.eval()
    with torch.no_grad(), tt.rows(model, ["a", None, "a", None]):
        mixed = tiny.output(model, IDS)
        base = tiny.output(tiny.llama(), IDS)
        torch.testing.assert_close(mixed[1], base[1], atol=1e-5, rtol=1e-5)
        with tt.using(model, "a"):
            alone = tiny.output(model, tiny.pick(IDS, [2]))[0]
        torch.testing.assert_close(mixed[2], alone, atol=1e-5, rtol=1e-5)


# -- AdaFit -------------------------------------------------------------------------------------------


def test_its_count_is_the_closed_form() -> None:
    n, r, k, groups = 768, 8, 32, 12
    model = nn.Sequential(nn.Linear(n, n), nn.Linear(n, n))
    lora, shared = r * 2 * n, 4 * (k * k + k * k + 2 * k)
    gate = r * k + k + k * groups + groups
    two, one = "inner=lora(rank=8, targets=['0', '1'])", "inner=lora(rank=8, targets=['0'])"
    counts = {
        f"adafit({two})": 2 * (lora + gate) + shared,
        f"adafit({two}, controller=mlp)": 2 * (lora + gate),
        f"adafit({one}, reads=input, group_size=1)": lora + (n * k + k) + (k * n + n) + shared,
        f"adafit({one}, scope=static)": lora + groups,
    }
    for text, count in counts.items():
        adapter = tt.attach(model, tt.method(text), "a")
        assert adapter.count == count, text
        tt.detach(model, "a")
    assert (shared, lora, n * k + k, k * n + n) == (
        8448,
        12288,
        24608,
        25344,
    )  # as methods.md has them


@torch.no_grad()
def test_the_cell_is_torchs() -> None:
    cell = nn.LSTMCell(5, 5)
    x, h, c = (torch.randn(3, 5) for _ in range(3))
    weights = {
        "ih": cell.weight_ih,
        "hh": cell.weight_hh,
        "b_ih": cell.bias_ih,
        "b_hh": cell.bias_hh,
    }
    for ours, theirs in zip(lstm(x, (h, c), weights), cell(x, (h, c)), strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_two_layers_by_hand() -> None:
    """The formula of the module, written out: reads, one LSTM through both layers, groups of channels."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    text = "adafit(inner=lora(rank=2, alpha=2, targets=['0', '1']), group_size=2, width=3)"
    adapter = shaken(tt.attach(model, tt.method(text), "a"), 1.5)
    t = adapter.tensors
    cell = nn.LSTMCell(3, 3)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        cell.get_parameter(name).copy_(t[f"gate.cell.{name}"])
    x = torch.randn(7, 5, 6)
    found, y, state, opened = model(x), x, None, []
    for n in ("0", "1"):
        code = F.linear(y, t[f"{n}.lora_A.weight"])
        read = F.linear(code.mean(1), t[f"{n}.gate.read.weight"], t[f"{n}.gate.read.bias"])
        state = cell(read, state)
        p = torch.sigmoid(
            F.linear(state[0], t[f"{n}.gate.write.weight"], t[f"{n}.gate.write.bias"])
        )
        gate = (p > 0.5).float().repeat_interleave(2, 1)
        opened.append(gate)
        y = model[int(n)].base_layer(y) + gate[:, None] * F.linear(code, t[f"{n}.lora_B.weight"])
    torch.testing.assert_close(found, y)
    assert 0 < float(torch.cat(opened, 1).mean()) < 1, "some are open and some are not"


def test_a_static_gate_merges_and_the_others_do_not() -> None:
    inner = "inner=lora(rank=4, targets=['embed', 're:conv.*', 'grouped', 'head'])"
    model, adapter = attached(f"adafit({inner}, scope=static, group_size=2)", tiny.mixed())
    with torch.no_grad():
        for key, tensor in adapter.tensors.items():
            if key.endswith("gate.logit"):
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    inputs = tiny.CASES["mixed"].inputs()
    torch.testing.assert_close(
        tiny.output(tt.merge(model, "a"), inputs), tiny.output(model, inputs)
    )
    assert tt.method("adafit(scope=static)").unmergeable == ""
    assert "each example" in tt.method("adafit").unmergeable
    assert (
        "activation" in tt.method("adafit(inner=bottleneck, reads=input, scope=static)").unmergeable
    )


@pytest.mark.parametrize("scope", ["sequence", "token"])
@pytest.mark.parametrize("model_name", ["llama", "mixtral", "deberta"])
def test_recomputed_blocks_go_on_from_the_state_they_were_given(
    scope: str, model_name: str
) -> None:
    found = []
    for recompute in (False, True):
        model = tiny.CASES[model_name].model()
        _, adapter = attached(
            f"adafit(inner=lora(rank=4), group_size=4, width=6, scope={scope})", model
        )
        if recompute:
            recompute_blocks(model)
        model.train()
        given = {} if model_name == "deberta" else {**LABELS, "use_cache": False}
        model(**IDS, **given).logits.tanh().sum().backward()
        found.append({key: tensor.grad for key, tensor in adapter.tensors.items()})
    for key, gradient in found[0].items():
        other = found[1][key]
        assert (gradient is None) == (other is None), key
        if gradient is not None:
            torch.testing.assert_close(gradient, other, msg=key)
    assert float(found[0]["gate.cell.weight_hh"].abs().sum()) > 0


def test_checkpointing_that_would_cut_its_gradient_is_an_error() -> None:
    model, _ = attached("adafit(inner=lora(rank=4), width=6)")
    new = "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")(
        {"use_reentrant": True}
    )
    model.enable_input_require_grads()
    model.train()
    loss = model(**IDS, **LABELS, use_cache=False).logits.sum()
    with pytest.raises(UnsupportedError, match="use_reentrant=False"):
        loss.backward()


@torch.no_grad()
def test_a_token_decides_from_itself_alone() -> None:
    """So a cache changes nothing, nor do later tokens."""
    model, adapter = attached("adafit(inner=lora(rank=4), group_size=4, width=6, scope=token)")
    for key, tensor in adapter.tensors.items():
        if "gate.write" in key:
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)) * 3)
    whole = model(**IDS, use_cache=False).logits
    torch.testing.assert_close(model(IDS["input_ids"][:, :5], use_cache=False).logits, whole[:, :5])
    first = model(IDS["input_ids"][:, :5], use_cache=True)
    rest = model(IDS["input_ids"][:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 5:])


@pytest.mark.parametrize(
    ("options", "least"),
    [("sparsity_weight=1.0", 0.1), ("sparsity_weight=9.0, target_rate=0.4", 0.02)],
)
def test_the_auxiliary_loss_closes_gates_or_brings_their_share_to_a_target(
    options: str, least: float
) -> None:
    model, adapter = attached(f"adafit(inner=lora(rank=4), group_size=4, width=6, {options})")
    optimiser = torch.optim.Adam([p for k, p in adapter.tensors.items() if "gate." in k], lr=0.2)
    model.train()
    found = []
    for _ in range(25):
        model(**IDS, **LABELS, use_cache=False)
        losses = bank_of(model).take_losses()
        assert {name for _, name, _ in losses} == {"gates"} and len(losses) == len(adapter.sites)
        total = torch.stack([value for _, _, value in losses]).sum()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        found.append(float(total.detach()))
    assert found[0] > 5 * least and found[-1] < least


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gated(inner='lora|bitfit')", "gate each of its parts"),
        ("gated(inner=spottune)", "gate each of its parts"),
        ("spottune(inner=prefix)", "layer-wise"),
        ("adafit(inner=ia3)", "edits a layer's input"),
        ("gated(inner=lora, targets=q_proj)", "says where it acts"),
        ("gated(inner=lora(train=['lm_head']))", "written in the gate"),
        ("spottune(inner=lora(layer_drop=true))", "written in the gate"),
    ],
)
def test_what_cannot_be_gated_says_why(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tt.method(text)


def test_what_a_model_cannot_gate_says_why() -> None:
    with pytest.raises(UnsupportedError, match="reads='input'"):
        tt.attach(tiny.llama(), tt.method("adafit(inner=bitfit)"))
    with pytest.raises(UnsupportedError, match="controller='mlp'"):
        tt.attach(tiny.t5(), tt.method("adafit(scope=token)"))
    tt.attach(tiny.t5(), tt.method("adafit(scope=token, controller=mlp)"))
    with pytest.raises(TrimtabError, match="no meaning there"):
        tt.attach(tiny.mixed(), tt.method("adafit(inner=lora(targets='conv1'), scope=token)"))


def test_an_inner_method_runs_its_own_steps_inside_a_gate() -> None:
    from trimtab.adapt.stepper import Stepper

    _, adapter = attached("spottune(inner=lora(rank=2), hidden=4)|bitfit")
    steps = Stepper(adapter)
    steps.before()
    steps.after()
    assert steps.step == 1 and steps.memory == {}


@pytest.mark.parametrize("text", ["gated(inner=lora(rank=2){})", "adafit(inner=lora(rank=2), width=4{})",
                                  "spottune(inner=lora(rank=2), hidden=4{})"])  # fmt: skip
def test_a_head_belongs_to_the_adapter_whatever_gates_the_rest(text: str, tmp_path: Any) -> None:
    inputs = tiny.CASES["classifier"].inputs()
    model = tiny.llama_classifier()
    adapter = shaken(tt.attach(model, tt.method(text.replace("{}", ", train=['score']")), "a"))
    assert [method.kind for method in adapter.methods] == [text.partition("(")[0], "full"]
    expected = tiny.output(model, inputs)
    adapter.save(tmp_path / "a")
    fresh = tiny.llama_classifier()
    tt.attach(fresh, tt.Adapter.load(tmp_path / "a"))
    assert torch.equal(tiny.output(fresh, inputs), expected)
    force(adapter, -1e4)
    only_head = tiny.llama_classifier()
    head = tt.attach(only_head, tt.Full(targets=("score",)), "h")
    with torch.no_grad():
        for key, tensor in head.tensors.items():
            tensor.copy_(adapter.tensors[key])
    assert torch.equal(tiny.output(model, inputs), tiny.output(only_head, inputs))


@pytest.mark.parametrize(
    "method",
    ["gated(inner=lora(rank=2))", "adafit(inner=lora(rank=2), width=4, sparsity_weight=0.1)",
     "lora(rank=2)|spottune(inner=bitfit, hidden=4)|prefix(length=2)"],
)  # fmt: skip
def test_packed_and_padded_training_are_the_same(method: str) -> None:
    from trimtab.data import Datum
    from trimtab.engine import Engine

    data = [
        Datum.causal([3, 4, 5, 6, 7], [0, 0, 1, 1, 1]),
        Datum.causal([8, 9, 10, 11], [0, 0, 1, 1]),
    ]
    found = []
    for packed in (True, False):
        model = tiny.llama()
        adapter = shaken(tt.attach(model, tt.method(method), "a"))
        if "spottune" in method:  # one long document and one short one choose alike
            force(adapter, 1e4)
        Engine(model, packed=packed).forward_backward(data, "a")
        found.append({k: t.grad for k, t in adapter.tensors.items() if "policy" not in k})
    for key, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][key], atol=1e-5, rtol=1e-4, msg=key)
