"""What the oracles need of both sides: the same weights, the same adapter values, the same inputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5ForConditionalGeneration,
)

import trimtab as tt
from tests import tiny as models
from trimtab.adapt.adapter import TensorName

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DEPRECATED = "`is_gradient_checkpointing` is deprecated"  # PEFT reads it, transformers warns
ALWAYS = (
    DEPRECATED,
    "Specified to not (save|load) ",  # of random matrices that a seed gives
    "Failed to load the CUDA extension",  # BOFT's
    "Setting boft_n_butterfly_factor to 1",  # and has no other without that extension
    "The symmetric initialization can NOT be performed",  # HRA's, of an odd rank
    "Unsupported layer type",  # LN tuning's, of every norm
    "`lora_bias=True` was passed",  # of a layer without a bias, which PEFT cannot merge
    "Adapter 'default': .* have invalid shape",  # of every bias of B that it saves
)

torch.sparse.check_sparse_tensor_invariants.disable()  # PEFT's SHiRA leaves it open, and torch warns

Make = Callable[[], nn.Module]
Batch = dict[str, Any]
Pairs = dict[str, tuple[Any, Any]]


# -- models -------------------------------------------------------------------------------------------


def loud(make: Make) -> Make:
    """The tiny model with larger matrices: the usual std of 0.02 leaves attention nearly uniform."""

    def made() -> nn.Module:
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)
        return model

    return made


llama = loud(models.llama)
llama_classifier = loud(models.llama_classifier)
gpt2 = loud(models.gpt2)
bert = loud(models.bert)
t5 = loud(models.t5)
gated_t5 = loud(lambda: models.t5(gated=True))


@loud
def mistral() -> nn.Module:
    """Its attention has a window of four tokens."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=models.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=4, pad_token_id=0,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@loud
def roberta() -> nn.Module:
    """Its head is a module of two linear layers."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=models.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).eval()


class Convolutions(nn.Module):
    """A plain module with the kinds of layers that PEFT's LoRA knows: (B, T) token ids -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCABULARY, 6)
        self.line = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.square = nn.Conv2d(2, 6, (3, 2), padding=(1, 0))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(self.embed(x).transpose(1, 2)).tanh()
        y = self.square(y.unflatten(1, (2, 4))).tanh()
        return self.head(y.mean((2, 3)))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions().eval()


class Pictures(Convolutions):
    """Convolutions of images with one size of kernel for both axes: (B, T) token ids -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.wide = nn.Conv2d(8, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).unflatten(-1, (2, 3)).permute(0, 2, 1, 3)
        y = self.point(self.square(y).tanh()).tanh()
        return self.head(self.wide(y).tanh().mean((2, 3)))


def pictures() -> nn.Module:
    torch.manual_seed(0)
    return Pictures().eval()


class Groups(Convolutions):
    """Grouped and dilated convolutions: (B, T) token ids -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(6, 8, 3, padding=2, dilation=2, groups=2)
        self.square = nn.Conv2d(2, 6, 3, padding=1, groups=2)


def groups() -> nn.Module:
    torch.manual_seed(0)
    return Groups().eval()


def batch_of(model: nn.Module, rows: int = 3, length: int = 7, seed: int = 1) -> Batch:
    """Inputs of a tiny model; the first row is padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, models.VOCABULARY, (rows, length), generator=generator)
    if isinstance(model, Convolutions):
        return {"x": ids}
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    batch: Batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if isinstance(model, T5ForConditionalGeneration):
        batch["decoder_input_ids"] = ids.flip(1)[:, : length - 1]
    return batch


def outputs(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits of the positions that are not padding (those of padding mean nothing)."""
    out = model(**batch)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    mask = batch.get("attention_mask")
    if logits.dim() == 3 and mask is not None and "decoder_input_ids" not in batch:
        logits = logits[:, -mask.shape[1] :]  # PEFT gives those of a prompt too
    if logits.dim() == 3 and mask is not None and mask.shape == logits.shape[:2]:
        logits = logits[mask.bool()]
    return logits


def objective(logits: Tensor) -> Tensor:
    """A smooth scalar whose gradient with respect to every logit differs."""
    direction = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    return (logits.sin() * direction).sum() / logits.shape[0] ** 0.5


# -- the peer -----------------------------------------------------------------------------------------


@contextmanager
def quiet(*messages: str) -> Iterator[None]:
    """Let the peer say these things, and nothing else."""
    with warnings.catch_warnings():
        for message in (*ALWAYS, *messages):
            warnings.filterwarnings("ignore", message=message)
        yield


def peft_model(make: Make, config: PeftConfig) -> PeftModel:
    """PEFT's model of that config on a fresh copy of the tiny model, in eval mode."""
    with quiet():
        return get_peft_model(make(), copy.deepcopy(config)).eval()  # type: ignore[arg-type]


def peft_name(theirs: nn.Module, name: TensorName) -> str:
    """The parameter of PEFT's model that our tensor ``name`` is, by PEFT's own grammar."""
    root = "base_model" if "prompt_encoder" in dict(theirs.named_children()) else "base_model.model"
    path = f"{root}.{name.path}"
    known = dict(theirs.named_parameters())
    if name.slot.startswith("lora_bias"):
        wrapped = f"{path}.base_layer.bias"
        return wrapped if wrapped in known else f"{path}.bias"
    if name.slot.startswith("adaption_"):
        return f"{path}.{name.slot}"
    if name.slot.startswith("modules_to_save."):
        leaf = name.slot.removeprefix("modules_to_save.")
        head, _, inner = path.rpartition(".")  # PEFT copies the whole head, we each layer in it
        whole = f"{head}.modules_to_save.default.{inner}.{leaf}"
        return whole if whole in known else f"{path}.modules_to_save.default.{leaf}"
    if not name.path:
        return f"{name.slot.replace('.', '.default.', 1)}"
    slot, _, tail = name.slot.rpartition(".")
    return f"{path}.{slot}.default.{tail}" if slot else f"{path}.{tail}.default"


def paired(adapter: tt.Adapter, theirs: nn.Module) -> Pairs:
    """Our tensor and PEFT's, by our key.

    Raises:
        AssertionError: the two sides do not train the same tensors in the same shapes.
    """
    parameters = dict(theirs.named_parameters())
    learnt = {n: t for n, t in adapter.named().items() if n not in adapter.fixed}
    names = {name.key: peft_name(theirs, name) for name in learnt}
    trained = {key for key, parameter in parameters.items() if parameter.requires_grad}
    assert trained == set(names.values()), trained ^ set(names.values())
    pairs = {n.key: (tensor, parameters[names[n.key]]) for n, tensor in learnt.items()}
    for key, (ours, other) in pairs.items():
        assert ours.shape == other.shape, key
    return pairs


@torch.no_grad()
def stir(adapter: tt.Adapter, seed: int = 2) -> None:
    """Move every trained tensor away from its first value (many start at zero)."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter.parameters():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


@torch.no_grad()
def give(pairs: Pairs) -> None:
    """Copy our values into PEFT's tensors."""
    for ours, other in pairs.values():
        other.copy_(ours)


# -- comparisons --------------------------------------------------------------------------------------


def assert_close(ours: Tensor, theirs: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Equal to 1e-5 in fp32, to 1e-10 in fp64, of each value or of the largest."""
    tolerance = TOLERANCE[dtype or theirs.dtype]
    largest = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
    torch.testing.assert_close(
        ours, theirs, atol=tolerance * largest, rtol=tolerance, msg=lambda text: f"{what}: {text}"
    )


def assert_same_function(
    ours: nn.Module,
    theirs: nn.Module,
    pairs: Pairs,
    batch: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    but: tuple[str, ...] = (),
) -> None:
    """Same outputs, and same gradients of every adapter tensor, ``but`` of those slots."""
    left, right = outputs(ours, batch), outputs(theirs, batch)
    assert_close(left, right, "outputs", dtype)
    objective(left).backward()
    objective(right).backward()
    for key, (mine, other) in pairs.items():
        assert mine.grad is not None, key
        if not key.endswith(but or (" ",)):
            assert_close(mine.grad, other.grad, key, dtype)
    assert any(bool(mine.grad.any()) for mine, _ in pairs.values())


@torch.no_grad()
def acts(model: nn.Module, name: str, batch: Mapping[str, Any]) -> bool:
    """Whether the adapter changes anything, so that no comparison is of two bare bases."""
    with tt.using(model, name):
        acting = outputs(model, batch)
    with tt.using(model, None):
        bare = outputs(model, batch)
    return bool((acting - bare).abs().max() > 1e-3)
