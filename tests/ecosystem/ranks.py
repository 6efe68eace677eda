"""What two gloo ranks on this CPU do, and how a test starts them.

Run as a program (``python -m tests.ecosystem.ranks RANK FILE``) it is one rank; it raises where what it
sees is not what one process alone computes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import trimtab as tt
from tests import tiny as models
from tests.laws.cells import shaken
from tests.tiny import VOCABULARY

WORLD = 2
METHODS = {
    "lora": "lora(rank=4)",
    "dora": "dora(rank=4)",
    "ia3": "ia3",
    "bitfit": "bitfit",
    "bottleneck": "bottleneck(size=4)",
    "prefix": "prefix(length=3)",
    "head": "lora(rank=4, targets='q_proj', train=['lm_head'])",
}


def start(folder: Path) -> None:
    """Run both ranks; a failure of either is one of the test, with what it printed."""
    command = [sys.executable, "-W", "error", "-m", "tests.ecosystem.ranks"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(printed)


def rows() -> Tensor:
    return torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))


def adapted(method: str) -> tuple[nn.Module, tt.Adapter]:
    model = models.llama(num_hidden_layers=2)
    adapter = shaken(tt.attach(model, method, "a"))
    shaken(tt.attach(model, "ia3", "other"), seed=2)
    tt.stack(model, ["a"])
    return model, adapter


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def alone(method: str, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one process."""
    model, adapter = adapted(method)
    loss_of(model, ids).backward()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return logits, {key: p.grad for key, p in adapter.tensors.items() if p.grad is not None}


def close(a: Tensor, b: Tensor, what: str) -> None:
    if not torch.allclose(a, b, atol=1e-5):
        raise AssertionError(f"{what}: differs by {(a - b).abs().max():.2e}")


def fsdp() -> None:
    """A sharded model computes what a whole one does, and its adapters get the same gradients."""
    ids = rows()
    mine = ids.chunk(WORLD)[dist.get_rank()]
    for name, method in METHODS.items():
        logits, gradients = alone(method, ids)
        model, adapter = adapted(method)
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        if not any(isinstance(p, DTensor) for p in adapter.parameters()):
            raise AssertionError(f"{name}: no tensor of the adapter is sharded")
        with torch.no_grad():
            close(model(input_ids=ids).logits, logits, f"{name}: logits")
            with tt.rows(model, ["a", None, "other", ["a", "other"]]):
                mixed = model(input_ids=ids).logits
            close(mixed[0], logits[0], f"{name}: a row of a mixed batch")
        loss_of(model, mine).backward()
        found = {key: whole(p.grad) for key, p in adapter.tensors.items() if p.grad is not None}
        if found.keys() != gradients.keys():
            raise AssertionError(f"{name}: {found.keys() ^ gradients.keys()}")
        for key, gradient in gradients.items():
            close(found[key], gradient, f"{name}: gradient of {key}")
        optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        optimiser.step()
        if not torch.isfinite(model(input_ids=ids).logits).all():
            raise AssertionError(f"{name}: after a step")


def ddp() -> None:
    """Gradients of the ranks are averaged, for rows of different adapters too."""
    ids = rows()
    mine = ids.chunk(WORLD)[dist.get_rank()]
    for name, method in METHODS.items():
        _, gradients = alone(method, ids)
        model, adapter = adapted(method)
        tt.detach(model, "other")  # DDP waits for a gradient of every parameter that learns
        parallel = DistributedDataParallel(model)
        loss_of(parallel, mine).backward()
        for key, gradient in gradients.items():
            found = adapter.tensors[key].grad
            if found is None:
                raise AssertionError(f"{name}: no gradient of {key}")
            close(found, gradient, f"{name}: gradient of {key}")
    model, a = adapted("lora(rank=4)")
    b = shaken(tt.attach(model, "lora(rank=4)", "b"), seed=3)
    tt.detach(model, "other")
    parallel = DistributedDataParallel(model)
    with tt.rows(parallel, ["a", "b"]):
        parallel(input_ids=mine).logits.tanh().sum().backward()
    for adapter in (a, b):
        for key, parameter in adapter.tensors.items():
            ranks = [torch.empty_like(parameter) for _ in range(WORLD)]
            dist.all_gather(ranks, parameter.grad)
            if not torch.equal(ranks[0], ranks[1]) or not ranks[0].any():
                raise AssertionError(f"{adapter.name}: {key}")


def fsdp_in_bf16() -> None:
    """A base in bf16 with masters in fp32, which FSDP shards side by side."""
    ids = rows()
    model = models.llama(num_hidden_layers=2).bfloat16()
    adapter = shaken(tt.attach(model, "lora(rank=4)", "a"))
    expected = model(input_ids=ids).logits
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    if not torch.equal(model(input_ids=ids).logits, expected):
        raise AssertionError("bf16: logits")
    loss_of(model, ids).backward()
    if {p.grad.dtype for p in adapter.parameters()} != {torch.float32}:
        raise AssertionError("bf16: gradients of masters are not fp32")


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        fsdp()
        fsdp_in_bf16()
        ddp()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
