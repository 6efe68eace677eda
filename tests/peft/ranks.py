"""What two gloo ranks on this CPU do with ``accelerate``, and how a test starts them.

Run as a program (``python -m tests.peft.ranks FOLDER``, with the variables of torchrun) it is one rank; it raises where
what it sees is not what one process alone computes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import trimtab.peft as ours
from tests import tiny
from tests.peft.ecosystem_kit import Rows, files, filled, learned, lora, train

WORLD, STEPS = 2, 3
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
}


def start(folder: Path) -> None:
    """Run both ranks; a failure of either is one of the test, with what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
              "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.peft.ranks", str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        printed = [rank.communicate(timeout=150)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(printed)


def expect(truth: bool, what: str) -> None:
    if not truth:
        raise AssertionError(what)


def model_of(options: dict[str, Any]) -> Any:
    model = ours.get_peft_model(tiny.llama(num_hidden_layers=2), lora(ours, **options))
    return model if "modules_to_save" in options else filled(model)


def batch(step: int) -> Tensor:
    return torch.stack([Rows()[row]["input_ids"] for row in range(4 * step, 4 * step + 4)])


def alone(options: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the trained values of one process that sees all rows."""
    torch.manual_seed(0)
    model = model_of(options)
    return steps(model, model, torch.optim.AdamW(trained(model), lr=1e-2), None, slice(None))


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def steps(
    model: Any, bare: Any, optimizer: Any, accelerator: Any, mine: slice
) -> tuple[list[float], dict[str, Tensor]]:
    found = []
    for step in range(STEPS):
        ids = batch(step)[mine]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach() if accelerator is None else accelerator.reduce(loss.detach(), "mean")
        found.append(float(whole))
    values = {
        n: (t.full_tensor() if isinstance(t, DTensor) else t) for n, t in learned(bare).items()
    }
    return found, values


def compared(name: str, mine: Any, theirs: Any) -> None:
    losses, values = zip(mine, theirs, strict=True)
    expect(
        torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-5),
        f"{name}: {losses}",
    )
    expect(values[0].keys() == values[1].keys() and bool(values[0]), f"{name}: other parameters")
    for key, value in values[0].items():
        expect(torch.allclose(value, values[1][key], atol=2e-5), f"{name}: {key}")


def ddp(folder: Path) -> None:
    """Two replicas, each with half of the rows; then a `Trainer` of two processes, of which one saves."""
    from accelerate import Accelerator
    from accelerate.utils import is_peft_model

    for name, options in METHODS.items():
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = model_of(options)
        expect(is_peft_model(model), "is_peft_model")
        prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-2))
        expect(is_peft_model(prepared) and accelerator.num_processes == WORLD, "prepared")
        rank = accelerator.process_index
        mine = steps(prepared, model, optimizer, accelerator, slice(2 * rank, 2 * rank + 2))
        compared(name, mine, alone(options))
    trainer = train(
        model_of({}), folder / "run", save_strategy="steps", save_steps=2, ddp_backend="gloo",
        per_device_train_batch_size=1,
    )  # fmt: skip
    ranks = [torch.empty(()) for _ in range(WORLD)]
    total = torch.stack([p.double().sum() for p in learned(trainer.model).values()]).sum().float()
    dist.all_gather(ranks, total)
    expect(bool(ranks[0] == ranks[1]), "the ranks differ after training")
    found = files(folder / "run" / "checkpoint-2")
    expect("adapter_model.safetensors" in found and "model.safetensors" not in found, str(found))


def as_fsdp(accelerator: Any, plugin: Any) -> None:
    """accelerate shards on accelerators only, and torch on the CPU too: let it go its way."""
    from accelerate.utils import DistributedType

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def fsdp(folder: Path) -> None:
    """Sharded by FSDP2, with the plugin's policy of blocks."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import is_peft_model

    from trimtab.errors import StorageError

    for name, options in METHODS.items():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )  # fmt: skip
        accelerator = Accelerator(cpu=True)
        as_fsdp(accelerator, plugin)
        torch.manual_seed(0)
        model = model_of(options)
        prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-2))
        expect(is_peft_model(prepared), "is_peft_model")
        expect(
            any(isinstance(p, DTensor) for p in trained(prepared)), f"{name}: nothing is sharded"
        )
        rank = accelerator.process_index
        mine = steps(prepared, prepared, optimizer, accelerator, slice(2 * rank, 2 * rank + 2))
        compared(name, mine, alone(options))
        as_fsdp(accelerator, plugin)
        state = accelerator.get_state_dict(prepared)
        unwrapped = accelerator.unwrap_model(prepared)
        unwrapped.save_pretrained(
            folder / name, state_dict=state, is_main_process=accelerator.is_main_process
        )
        try:
            unwrapped.save_pretrained(folder / f"{name}-{rank}")
        except StorageError as error:
            expect("state_dict" in str(error), str(error))
        else:
            raise AssertionError("shards were saved as if they were whole")
        accelerator.wait_for_everyone()
        again = ours.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), folder / name)
        for key, value in mine[1].items():
            there = dict(again.named_parameters())[key]
            expect(torch.equal(there, value), f"{name}: {key} as saved")


def fsdp_of_the_first_kind(folder: Path) -> None:
    """Sharded by ``FullyShardedDataParallel`` with `trimtab.peft.utils.other.fsdp_auto_wrap_policy`."""
    from accelerate import Accelerator
    from torch.distributed.fsdp import FullyShardedDataParallel

    from trimtab.peft.utils.other import fsdp_auto_wrap_policy

    accelerator = Accelerator(cpu=True)
    model = model_of({})
    expected = alone({})
    policy = fsdp_auto_wrap_policy(model)
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    rank = accelerator.process_index
    optimizer = torch.optim.AdamW(trained(sharded), lr=1e-2)
    mine = slice(2 * rank, 2 * rank + 2)
    losses, _ = steps(sharded, sharded, optimizer, accelerator, mine)
    with FullyShardedDataParallel.summon_full_params(sharded, writeback=False):
        named = learned(sharded)
        values = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in named.items()}
        model.save_pretrained(folder / "first", is_main_process=rank == 0)
    compared("FSDP of the first kind", (losses, values), expected)
    accelerator.wait_for_everyone()
    again = ours.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), folder / "first")
    there = dict(again.named_parameters())
    expect(all(torch.equal(there[k], v) for k, v in values.items()), "as saved")


PARTS = (ddp, fsdp_of_the_first_kind, fsdp)

if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        for part in PARTS:
            part(Path(sys.argv[1]))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
