"""A base of seven billion parameters on a small machine: NF4, LoRA, gradient checkpointing.

A model of Llama-2-7B's shape with random weights is written to disk shard by shard (13.5 GB; removed at the end unless
``--keep``). It is loaded as NF4, each weight rounded as it is read, and takes training steps of LoRA (r=16 on all
linear layers, fp32 adapters, AdamW), once unpacking with bitsandbytes and once in plain torch. What is measured is
anonymous resident memory (what a process needs for itself; pages of mapped files can be dropped at any time), by a
thread that looks every 10 ms, and the time of a step.

    python -m benchmarks big_base               (half an hour on two cores)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from benchmarks.core import ROOT, hide_bitsandbytes
from benchmarks.report import commit, machine

SHAPE = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
STATUS = Path("/proc/self/status")
EVERY = 0.01
"""Seconds between two looks at the memory."""


def write(folder: Path, shape: dict[str, int], seed: int = 0) -> int:
    """A checkpoint of random weights, a shard for each block; the number of its parameters."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from recipes import assets

    config = LlamaConfig(**shape, tie_word_embeddings=False, dtype="bfloat16")
    generator = torch.Generator().manual_seed(seed)
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size

    def random(*size: int) -> torch.Tensor:
        values = torch.empty(size, dtype=torch.bfloat16)
        return values.normal_(0, 0.02, generator=generator)

    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for file in Path(assets.smollm2()).glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    names: dict[str, str] = {}
    count = 0

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal count
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        names.update(dict.fromkeys(tensors, file))
        count += sum(tensor.numel() for tensor in tensors.values())

    for block in range(config.num_hidden_layers):
        at = f"model.layers.{block}"
        tensors = {f"{at}.self_attn.{n}_proj.weight": random(width, width) for n in "qkvo"}
        tensors |= {f"{at}.mlp.{n}_proj.weight": random(inner, width) for n in ("gate", "up")}
        tensors[f"{at}.mlp.down_proj.weight"] = random(width, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        shard(block, tensors)
    shard(
        config.num_hidden_layers,
        {
            "model.embed_tokens.weight": random(vocabulary, width),
            "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
            "lm_head.weight": random(vocabulary, width),
        },
    )
    index = {"metadata": {"total_size": 2 * count}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return count


# -- one process -----------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Resident memory of this process that is not of a mapped file."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched() -> Iterator[list[int]]:
    """The most anonymous memory so far, in a list of one."""
    most, ended = [anonymous_bytes()], threading.Event()

    def look() -> None:
        while not ended.wait(EVERY):
            most[0] = max(most[0], anonymous_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def train(folder: str, tokens: int, steps: int, rank: int, plain: bool) -> dict[str, Any]:
    """Load and train, here."""
    import trimtab as tt
    from trimtab.data import Datum
    from trimtab.engine import Engine
    from trimtab.optim.params import AdamParams
    from trimtab.peft import prepare_model_for_kbit_training

    if plain:
        hide_bitsandbytes()
    found: dict[str, Any] = {"bitsandbytes": not plain, "before": anonymous_bytes()}
    with watched() as most:
        start = time.perf_counter()
        base = tt.load(folder, dtype=torch.bfloat16, device="cpu", storage="nf4")
        found |= {"load_seconds": time.perf_counter() - start, "load_peak": most[0]}
        found["loaded"] = anonymous_bytes()
        prepare_model_for_kbit_training(base.model)  # recompute activations
        tt.attach(base.model, tt.LoRA(rank=rank, alpha=2.0 * rank), name="default")
        engine = Engine(base)
        adam = AdamParams(lr=2e-4)
        generator = torch.Generator().manual_seed(1)
        found["steps"] = []
        for _ in range(steps):
            ids = torch.randint(base.model.config.vocab_size, (tokens + 1,), generator=generator)
            row = ids.tolist()
            start = time.perf_counter()
            loss = engine.forward_backward(
                [Datum(tuple(row[:-1]), tuple(row[1:]), (1.0,) * tokens)], "default"
            ).mean
            engine.optim_step("default", adam)
            found["steps"].append({"seconds": time.perf_counter() - start, "loss": loss})
        found["peak"] = most[0]
    trained = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    return found | {"trained": trained}


# -- all -------------------------------------------------------------------------------------------


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the model, train with and without bitsandbytes."""
    count = write(folder, SHAPE | ({"num_hidden_layers": options.blocks} if options.blocks else {}))
    print(f"written: {count / 1e9:.2f} billion parameters", flush=True)
    runs = []
    for plain in (False, True) if util.find_spec("bitsandbytes") else (True,):
        call = json.dumps([str(folder), options.tokens, options.steps, options.rank, plain])
        said = subprocess.run(
            [sys.executable, "-m", "benchmarks.big_base", "--one", call],
            check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        runs.append(json.loads(said.stdout.splitlines()[-1]))
        print(runs[-1], flush=True)
    return {
        "benchmark": "big_base", "commit": commit(), "machine": machine(), "parameters": count,
        "tokens": options.tokens, "rank": options.rank, "runs": runs,
        "versions": {name: _version(name) for name in ("torch", "transformers", "bitsandbytes")},
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    first = found["runs"][0]
    lines = [
        "# A base of seven billion parameters on a small machine",
        "",
        f"A model of Llama-2-7B's shape ({found['parameters'] / 1e9:.2f} B parameters, random weights), stored as NF4; "
        f"LoRA r={found['rank']} on all linear layers ({first['trained'] / 1e6:.1f} M trained), steps of "
        f"{found['tokens']} tokens with gradient checkpointing. {found['machine']['cpu']}, {found['machine']['cores']} "
        f"cores; commit {found['commit']}. Made by `python -m benchmarks big_base`. Memory is anonymous resident "
        "memory of the whole process; the checkpoint's file is mapped.",
        "",
        "| unpacked by | loading, s | after loading, GB | peak while loading, GB | peak of all, GB | a step, s |",
        "|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        seconds = sorted(step["seconds"] for step in run["steps"][1:] or run["steps"])
        lines.append(
            f"| {'bitsandbytes' if run['bitsandbytes'] else 'plain torch'} | {run['load_seconds']:.0f} "
            f"| {run['loaded'] / 1e9:.2f} | {run['load_peak'] / 1e9:.2f} | {run['peak'] / 1e9:.2f} "
            f"| {seconds[len(seconds) // 2]:.1f} |"
        )
    losses = ", ".join(f"{step['loss']:.4f}" for step in first["steps"])
    return "\n".join([*lines, "", f"Losses of the steps: {losses}.", ""])


def main(argv: Sequence[str]) -> int:
    """Measure, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="big_base")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", type=int, help="fewer blocks, to try it out")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="write the model here, and leave it"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(train(*json.loads(options.one))))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        found = run(options.keep or Path(scratch), options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "big_base.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (options.out / "big_base.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
