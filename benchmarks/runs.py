"""What the benchmarks of whole training runs share: runs that take turns, equal beginnings, equal ends.

A run of a `Trainer` is one call. `Turns` lets it stand still between optimiser steps, in a thread of its own, while the
other side computes. glibc gives each thread a pool of memory with other rules; `one_pool` takes them away, on both
sides, so that the allocator is the one that the benchmark names.

After its last step a run begins anew with the values that it has, for rounds that have to be repeated on a busy
machine; what is measured on held-out data is kept from the end of the first (`Kept`).
"""

from __future__ import annotations

import ctypes
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ARENA_MAX = -8  # as in malloc.h


def one_pool() -> None:
    """Let all threads of this process share one pool of memory; nothing where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_ARENA_MAX, 1)


class Turns:
    """Runs ``body`` in a thread, which stands still wherever it calls `pause`."""

    def __init__(self, body: Callable[[], None]) -> None:
        self._body = body
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def turn(self) -> None:
        """Let it go on until its next pause; raises what it raises."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Called by the body: wait for the next turn."""
        self._back.release()
        self._go.acquire()

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._body()
        except BaseException as error:
            self._error = error
        self._back.release()


class Paced:
    """A `Trainer` whose run stands still after each ``each`` optimiser steps; ``ended`` is called after the last.

    The loss of each step is what the trainer logs, which it must do at each.
    """

    def __init__(self, trainer: Any, each: int, ended: Callable[[], None]) -> None:
        from transformers import PrinterCallback, TrainerCallback

        self._losses: list[float] = []
        turns = Turns(lambda: _again(trainer.train))
        losses = self._losses

        class Pauses(TrainerCallback):  # type: ignore[misc]
            """Before a step, since what a step costs ends after its log."""

            def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                if state.global_step and state.global_step % each == 0:
                    turns.pause()

            def on_log(
                self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any
            ) -> None:
                if "loss" in logs:
                    losses.append(float(logs["loss"]))

            def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                ended()
                turns.pause()

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Pauses())
        self._turns = turns

    def turn(self) -> list[float]:
        """The losses of the next steps, which are done now."""
        self._losses.clear()
        self._turns.turn()
        return list(self._losses)


def _again(run: Callable[[], Any]) -> None:
    while True:
        run()


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name without PEFT's prefix, parameter) of all that is trained."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name.removeprefix("base_model.model."), parameter


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Begin as LoRA does (B is zero, A uniform; a new head is small), with values that names and ``seed`` decide."""
    for name, parameter in trained(model):
        if ".lora_B." in name or parameter.dim() < 2:
            parameter.zero_()
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        draw = torch.rand(parameter.shape, generator=generator) * 2 - 1
        parameter.copy_(draw * (parameter.shape[1] ** -0.5 if ".lora_A." in name else 0.02))


def size(model: nn.Module, head: int = 0) -> dict[str, int]:
    """Trained parameters; and P, those of the base without its embeddings but for ``head``."""
    own = {id(parameter) for _, parameter in trained(model)}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    base = sum(p.numel() for p in model.parameters() if id(p) not in own | tables)
    return {"trained": sum(p.numel() for _, p in trained(model)), "P": base + head}


class Learns:
    """Our side of a run: the engine's verbs, with the optimiser and the rates that a `Trainer` has by default."""

    work: Any
    engine: Any
    adapter: Any
    kept: Kept
    data: Any
    done = 0

    def step(self, number: int) -> dict[str, Any]:
        """The next optimiser steps, on the next examples; after the last of the run, the first ones again."""
        losses, tokens = [], 0
        for _ in range(self.work.steps):
            start = self.done * self.work.batch
            members = list(self.data[start : start + self.work.batch])
            losses.append(self._step(members))
            tokens += sum(map(len, members))
        if self.done == self.work.total:
            self.kept.take()
            self.done = 0
        return {"units": self.work.steps * self.work.batch, "tokens": tokens, "losses": losses}

    def _step(self, members: list[Any]) -> float:
        from trimtab.optim.params import AdamParams

        lr = linear(self.work.lr, self.done, self.work.total)
        self.engine.micro_tokens = max(2048, *map(len, members))  # as a run does
        loss: float = self.engine.forward_backward(members, self.adapter.name).mean
        params = AdamParams(lr=lr, beta1=0.9, beta2=0.999, weight_decay=0.0, clip=1.0)
        self.engine.optim_step(self.adapter.name, params)
        self.done += 1
        return loss

    def save(self, folder: str) -> None:
        """What was learnt by the end of the run."""
        self.kept.put_back()
        self.adapter.save(folder)


class Kept:
    """Values of what is trained, from the end of the first run."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values: dict[str, Tensor] | None = None

    def take(self) -> None:
        """At the end of a run; only the first counts."""
        if self._values is None:
            self._values = {n: p.detach().clone() for n, p in trained(self._model)}

    @torch.no_grad()
    def put_back(self) -> None:
        """Let the model have them again."""
        if self._values is None:
            raise RuntimeError("the run has not ended: too few steps were asked for.")
        for name, parameter in trained(self._model):
            parameter.copy_(self._values[name])


def quiet() -> None:
    """No warnings of the libraries in this process."""
    warnings.simplefilter("ignore")


def linear(lr: float, step: int, total: int) -> float:
    """The rate of ``step`` (from 0) as a `Trainer` has it by default: linear to zero, without warm-up."""
    return lr * (1 - step / total)


def difference(ours: Iterable[float], peer: Iterable[float], weights: Iterable[float]) -> Any:
    """Our loss less the peer's for each unit of weight, over the same examples, with its 95 % interval."""
    from trimtab.evals.intervals import ratio

    return ratio([a - b for a, b in zip(ours, peer, strict=True)], list(weights))
