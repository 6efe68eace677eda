"""The cells of the laws: every registered method on every model, and what must be refused, with the reason.

A method that registers is here at once, with its defaults; ``SMALL`` only makes known ones small. A cell that
is not in ``REFUSED`` must work.

The product of methods, models (each densely and in every format of few bits) and laws is too large for each
change. Without ``TRIMTAB_LAWS=all`` (``make laws``) every law runs for every method on one model (those about layer
kinds on a second); on every other model each method meets some of the laws and each law some of the methods
(`tests/laws/test_cells.py` proves it); and a format of few bits is on a model or two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.t5 import modeling_t5

import trimtab as tt
from tests.tiny import CASES, STORED
from trimtab.adapt.contract import Method
from trimtab.adapt.parse import method_from

SMALL = {
    "lora": "lora(rank=4)",
    "dora": "dora(rank=4)",
    "arrow": "arrow(experts=3, rank=4)",
    "adalora": "adalora(rank=4, target_rank=2)",
    "bdlora": "bdlora(rank=4, blocks=2, block_a=['o_proj', 'down_proj'])",
    "kasa": "kasa(rank=4, alpha=8)",
    "monteclora": "monteclora(rank=4, samples=3)",
    "qalora": "qalora(rank=4, alpha=8, group=8)",
    "velora": "velora(rank=4, groups=8)",
    "bottleneck": "bottleneck(size=6)",
    "pfeiffer": "pfeiffer(size=6)",
    "parallel": "parallel(size=6)",
    "adapterplus": "adapterplus(size=6)",
    "compacter": "compacter(size=8)",
    "fusion": "fusion(parts=['pfeiffer(size=4)', 'pfeiffer(size=6)'])",
    "loreft": "loreft(rank=3, first=2, last=1)",
    "direft": "direft(rank=3, first=1, last=2)",
    "noreft": "noreft(rank=3, first=2, last=2, tied=True)",
    "llama-adapter": "llama-adapter(length=3, gate='scalar')",
    "prefix": "prefix(length=3, init_std=1.0)",
    "prompt": "prompt(length=3)",
    "ptuning": "ptuning(length=3, hidden=8)",
    "spottune": "spottune(inner=lora(rank=4), hidden=8)",
    "full": "full(targets='mlp_down')",
    "shira": "shira(rank=3)",
    "adafit": "adafit(inner=lora(rank=4), group_size=4, width=6)",
    "gated": "gated(inner=lora(rank=4))",
    "union": "lora(rank=4)|bitfit|prefix(length=3, init_std=1.0)",
    "loha": "loha(rank=4)",
    "lokr": "lokr(rank=2)",
    "hira": "hira(rank=4)",
    "fourierft": "fourierft(entries=12)",
    "vera": "vera(rank=8)",
    "randlora": "randlora(rank=8, alpha=32)",
    "mora": "mora(rank=2)",
    "miss": "miss(rank=4)",
    "oft": "oft(block=8)",
    "boft": "boft(block=4, factors=2)",
    "hra": "hra(rank=4)",
    "tokens": "tokens(ids=(5, 17, 40, 3, 60))",
    "diff": "diff(keep=0.1)",
}
EVERY_KIND = "['embed', 're:conv.*', 'grouped', 'norm', 'batch_norm', 'head']"
MATRICES = "['embed', 're:conv.*', 'grouped', 'head']"
POOLED = ("bert", "classifier", "roberta", "deberta", "vit", "clip")
"""Models whose head reads one position of the last block: there only one end of the prompt can learn."""
TEXT_TOWER = "prefix(length=3, init_std=1.0, targets='re:text_model.*self_attn')"
ON_MODEL = {
    **{
        (name, "mixed"): SMALL[name].replace(")", f", targets={MATRICES})")
        for name in (
            "lora", "dora", "adalora", "fourierft", "vera", "mora", "miss", "hra", "diff",
        )
    },
    ("loha", "mixed"): f"loha(rank=4, tucker=True, targets={MATRICES})",
    ("lokr", "mixed"): f"lokr(rank=1, tucker=True, targets={MATRICES})",
    ("hira", "mixed"): f"hira(rank=4, rank_pattern={{'conv1': 2}}, targets={MATRICES})",
    ("randlora", "mixed"): f"randlora(rank=8, alpha=32, drawing='sparse', targets={MATRICES})",
    ("kasa", "mixed"): f"kasa(rank=2, targets={MATRICES})",
    ("bdlora", "mixed"): "bdlora(rank=4, blocks=2, block_a=['head'], targets='head')",
    ("monteclora", "mixed"): "monteclora(rank=4, samples=3, targets='head')",
    ("qalora", "mixed"): "qalora(rank=4, group=2, targets='head')",
    ("velora", "mixed"): "velora(rank=4, groups=4, targets='head')",
    ("arrow", "mixed"): "arrow(experts=3, rank=4, targets='head')",
    ("shira", "mixed"): f"shira(rank=2, targets={MATRICES})",
    ("piggyback", "mixed"): f"piggyback(targets={MATRICES})",
    ("oft", "mixed"): (
        "oft(block=2, epsilon=1.0, terms=4, bias='all', targets=['embed', 'conv1', 'conv2', 'grouped', 'head'])"
    ),
    ("boft", "mixed"): f"boft(blocks=2, bias='all', targets={MATRICES})",
    ("ia3", "mixed"): "ia3(targets=['embed', 'conv1', 'conv2', 'norm'], feedforward=['head', 'grouped', 'conv3'])",
    ("full", "mixed"): f"full(targets={EVERY_KIND})",
    ("tokens", "mixed"): "tokens(ids=(5, 17, 40, 3, 60), targets='embed')",
    ("bottleneck", "mixed"): f"bottleneck(size=6, targets={EVERY_KIND})",
    ("pfeiffer", "mixed"): f"pfeiffer(size=6, targets={EVERY_KIND})",
    ("parallel", "mixed"): "parallel(size=6, targets=['head', 'norm'])",
    ("adapterplus", "mixed"): f"adapterplus(size=6, targets={EVERY_KIND})",
    ("compacter", "mixed"): "compacter(size=8, targets=['embed', 'conv1', 'conv2', 'grouped', 'norm', 'batch_norm'])",
    ("fusion", "mixed"): (
        f"fusion(parts=[pfeiffer(size=4, targets={EVERY_KIND}), bottleneck(size=6, targets={EVERY_KIND})])"
    ),
    **{
        ("gated", c): "gated(inner=prefix(length=3, init_std=1.0))"
        for c in ("gpt2", "bert", "t5", "classifier")
    },
    ("gated", "mixed"): f"gated(inner=lora(rank=4, targets={MATRICES}))",
    ("adafit", "mixed"): f"adafit(inner=lora(rank=4, targets={MATRICES}), group_size=3, width=6)",
    **{
        (m, c): f"{m}(rank=3, first=2, last=1, tied=True)"
        for m in ("loreft", "direft")
        for c in POOLED
    },
    ("lora", "classifier"): "lora(rank=4, train=['score'])",
    ("lora", "gpt2"): "lora(rank=4, lora_bias=True)",
    ("miss", "gpt2"): "miss(rank=4, bias='targets')",
    ("hra", "gpt2"): "hra(rank=4, bias='all')",
    ("fourierft", "bert"): "fourierft(entries=12, bias='all', train=['classifier'])",
    ("randlora", "bert"): "randlora(rank=8, alpha=32, bias='targets')",
    ("bitfit", "deberta"): "bitfit(copies='all')",
    ("lora", "bert"): "lora(rank=4, train=['classifier'])",
    # each tower has attention of its own width, and an input of its own
    ("tokens", "clip"): "tokens(ids=(5, 17, 40, 3, 60), targets='token_embedding')",
    ("prefix", "clip"): TEXT_TOWER,
    ("union", "clip"): f"lora(rank=4)|bitfit|{TEXT_TOWER}",
    ("spottune", "clip"): "spottune(inner=lora(rank=4, targets='re:vision_model.*fc.'), hidden=8)",
}  # fmt: skip

NO_ATTENTION = "there is no attention in it to put keys and values into"
NO_TOKENS = "it is no transformers model that reads tokens before which a prompt could stand"
NO_EMBEDDINGS = (
    "its text tower takes token ids alone, so only a prompt in the text (placeholder) has a place"
)
NO_BLOCKS = "it has no transformer blocks and no hidden states of one width"
NO_REGISTRY = (
    "its attention computes softmax itself, outside the attention registry of transformers"
)
REFUSED = {
    ("llama-adapter", "bloom"): NO_REGISTRY,
    ("llama-adapter", "deberta"): NO_REGISTRY,
    ("llama-adapter", "falcon"): NO_REGISTRY,
    ("llama-adapter", "mixed"): NO_ATTENTION,
    ("prefix", "bloom"): NO_REGISTRY,
    ("prefix", "deberta"): NO_REGISTRY,
    ("prefix", "falcon"): NO_REGISTRY,
    ("tokens", "vit"): "an image has no tokens, and the table of none",
    ("loreft", "mixed"): NO_BLOCKS,
    ("direft", "mixed"): NO_BLOCKS,
    ("noreft", "mixed"): NO_BLOCKS,
    ("prefix", "mixed"): NO_ATTENTION,
    ("prompt", "clip"): NO_EMBEDDINGS,
    ("prompt", "mixed"): NO_TOKENS,
    ("prompt", "vit"): NO_TOKENS,
    ("ptuning", "clip"): NO_EMBEDDINGS,
    ("ptuning", "mixed"): NO_TOKENS,
    ("ptuning", "vit"): NO_TOKENS,
    ("spottune", "mixed"): NO_BLOCKS,
    ("union", "bloom"): NO_REGISTRY,
    ("union", "deberta"): NO_REGISTRY,
    ("union", "falcon"): NO_REGISTRY,
    ("union", "mixed"): NO_ATTENTION,
}
"""Cells that mathematics forbids."""
if not hasattr(
    modeling_t5, "ALL_ATTENTION_FUNCTIONS"
):  # releases before its attention joined the registry
    REFUSED |= {
        (method, name): "its attention cannot be reached"
        for method in ("prefix", "llama-adapter", "union")
        for name in ("t5", "t5-gated")
    }

REFUSED |= {
    (method, name): reason
    for name in sorted(STORED)
    for (method, model), reason in REFUSED.items()
    if model == CASES[name].architecture
}
REFUSED |= {
    ("full", name): "cannot be trained itself"  # nothing can learn in codes of few bits
    for name in sorted(STORED)
    if not name.startswith("t5")  # whose last layer of an MLP stays wide, as its config asks
}

NOT_MERGEABLE = {
    "bottleneck": "a non-linear activation",
    "pfeiffer": "a non-linear activation",
    "parallel": "a non-linear activation",
    "adapterplus": "a non-linear activation",
    "compacter": "a non-linear activation",
    "fusion": "a non-linear activation",
    "loreft": "chosen positions",
    "direft": "chosen positions",
    "noreft": "chosen positions",
    "llama-adapter": "a softmax of its own",
    "prefix": "softmax of attention",
    "prompt": "tokens before the text",
    "ptuning": "tokens before the text",
    "spottune": "each example chooses",
    "gated": "each example scales",
    "adafit": "each example opens",
    "arrow": "each token chooses",
    "union": "in its part prefix, it adds keys and values to the softmax of attention",
}
IDENTITY_AT_FIRST = {
    "adafit", "adalora", "arrow", "bdlora", "bitfit", "boft", "diff", "dora", "full", "gated", "hira", "hra", "ia3",
    "llama-adapter", "loha", "lokr", "lora", "miss", "monteclora", "mora", "norms", "oft", "parallel", "piggyback",
    "qalora", "randlora", "shira", "spottune", "tokens", "velora", "vera",
}  # fmt: skip
"""Methods that start as the identity (other bottlenecks only nearly; a prefix, prompt or intervention never)."""


@dataclass(frozen=True)
class Cell:
    method: str
    model: str

    @property
    def id(self) -> str:
        return f"{self.method}-{self.model}"

    @property
    def architecture(self) -> str:
        """The model, however it is stored."""
        return CASES[self.model].architecture or self.model

    def value(self) -> Method:
        text = ON_MODEL.get((self.method, self.architecture)) or SMALL.get(self.method, self.method)
        return method_from(text)


def registered() -> list[str]:
    return tt.methods()


def cells() -> list[Cell]:
    return [Cell(m, c) for m in registered() for c in CASES if (m, c) not in REFUSED]


# -- which cells a law runs on ------------------------------------------------------------------------

Where = Callable[[Cell], bool]


def _anywhere(cell: Cell) -> bool:
    return True


def _starts_as_identity(cell: Cell) -> bool:
    value = cell.value()
    inside = dict(value).get("inner", value)  # a gated prefix is not, where a gated LoRA is
    return cell.method in IDENTITY_AT_FIRST and not inside.overrides("keys_values")


def _merges(cell: Cell) -> bool:
    return cell.method not in NOT_MERGEABLE


def _generates(cell: Cell) -> bool:
    return CASES[cell.model].generates


def _decodes(cell: Cell) -> bool:
    return CASES[cell.model].decodes


def _answers(cell: Cell) -> bool:
    return CASES[cell.model].decodes and CASES[cell.model].generates


def _packs(cell: Cell) -> bool:
    """The norms of Gemma's queries and keys see (batch, heads, positions, width), in which documents cannot be told."""
    return CASES[cell.model].packs and (cell.method, cell.architecture) != (
        "norms",
        "gemma3",
    )


def _has_mlps(cell: Cell) -> bool:
    """Whether the MLPs are modules of their own (of the others the next test of the engine says that they are not)."""
    return cell.architecture not in ("bert", "roberta", "deberta", "bart", "mixed")


LAWS: Mapping[str, Where] = {
    "test_the_edit_does_something": _anywhere,
    "test_identity_at_first": _starts_as_identity,
    "test_disabled_is_the_base_bitwise": _anywhere,
    "test_merge_is_forward": _anywhere,
    "test_merged_in_place_nothing_changes_for_anyone": _anywhere,
    "test_closed_form_merge_is_the_identity_push": _merges,
    "test_a_row_in_a_mixed_batch_is_the_row_alone": _anywhere,
    "test_every_method_shares_a_batch_with_this_one": _anywhere,
    "test_trained_together_is_trained_alone": _anywhere,
    "test_trained_beside_other_methods_is_trained_alone": _anywhere,
    "test_exactly_the_declared_parameters_learn_and_the_base_stays": _anywhere,
    "test_save_and_load_is_the_identity": _anywhere,
    "test_detach_leaves_no_trace": _anywhere,
    "test_state_dict_keeps_the_names_of_the_base": _anywhere,
    "test_copies_are_independent": _anywhere,
    "test_checkpointed_gradients_are_plain_gradients": _anywhere,
    "test_recomputed_mlps_give_plain_gradients": _has_mlps,
    "test_lean_gradients_are_plain_gradients": _anywhere,
    "test_mixed_rows_generate_as_each_alone": _generates,
    "test_beams_of_mixed_rows_are_the_beams_of_each_alone": _generates,
    "test_a_cache_changes_nothing": _generates,
    "test_left_padding_changes_nothing": _decodes,
    "test_served_together_is_generated_alone": _answers,
    "test_a_packed_document_is_the_document_alone": _packs,
}
"""Each law, by the name of its test, and the cells that it is about."""
ON_KINDS = {
    "test_identity_at_first",
    "test_merge_is_forward",
    "test_closed_form_merge_is_the_identity_push",
    "test_a_row_in_a_mixed_batch_is_the_row_alone",
    "test_trained_together_is_trained_alone",
    "test_exactly_the_declared_parameters_learn_and_the_base_stays",
}
"""Laws that run for every method on the plain module with every kind of layer too."""
FULL = os.environ.get("TRIMTAB_LAWS") == "all"


def cells_of(law: str, *, full: bool = FULL) -> list[Cell]:
    """The cells that a law runs on."""
    found = [cell for cell in cells() if LAWS[law](cell)]
    return found if full else [cell for cell in found if _sampled(law, cell)]


def _sampled(law: str, cell: Cell) -> bool:
    if cell.model == "llama" or (cell.model == "mixed" and law in ON_KINDS):
        return True
    return (law, cell) in _dealt(cell.model)


@cache
def _dealt(model: str) -> set[tuple[str, Cell]]:
    """On one model: a method for each law in turn, no method twice, and a law for each method that is left."""
    here = [cell for cell in cells() if cell.model == model]
    turn = list(CASES).index(model)  # so that a method meets other laws on the next model
    left = here[turn % len(here) :] + here[: turn % len(here)]
    found = set()
    for law, about in LAWS.items():
        able = [cell for cell in left if about(cell)] or [cell for cell in here if about(cell)]
        if able:
            found.add((law, able[0]))
            left = [cell for cell in left if cell != able[0]]
    for number, cell in enumerate(left):
        laws = [law for law, about in LAWS.items() if about(cell)]
        found.add((laws[(number + turn) % len(laws)], cell))
    return found


def law(test: Callable[..., None]) -> Any:
    """Decorates a test of a ``cell``: it runs on those of its law."""
    return pytest.mark.parametrize("cell", cells_of(test.__name__), ids=lambda cell: cell.id)(test)


def shaken(adapter: tt.Adapter, size: float = 0.2, seed: int = 1) -> tt.Adapter:
    """Give an attached adapter values away from its first ones, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)
    return adapter


def attached(cell: Cell, model: nn.Module, name: str = "a", *, seed: int = 1) -> tt.Adapter:
    """The cell's method attached and shaken."""
    return shaken(tt.attach(model, cell.value(), name), seed=seed)
