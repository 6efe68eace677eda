"""The four verbs, for one base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.adapt.attach import attach
from trimtab.adapt.bank import Plan, bank_of, find_bank
from trimtab.adapt.route import Route
from trimtab.adapt.tiers import Budgets
from trimtab.adapt.tree import anatomy_of
from trimtab.data import Datum
from trimtab.engine import limits, state
from trimtab.engine.aims import Aim
from trimtab.engine.answering import Answering
from trimtab.engine.class_head import ClassHead
from trimtab.engine.frozen import Frozen
from trimtab.engine.head import Head, TokenHead
from trimtab.engine.micro import Layout, Micro, Who, layout_of
from trimtab.engine.passes import Pass, mode, scope
from trimtab.engine.results import LossResult, StepResult
from trimtab.engine.rooms import Rooms, Unwatched
from trimtab.engine.sampling import Completion, SamplingParams
from trimtab.engine.serve.request import Request
from trimtab.engine.streaming import Stream
from trimtab.engine.tenant import Tenant, Tenants
from trimtab.engine.tiers import tiers_of
from trimtab.errors import (
    DataError,
    RouteError,
    UnsupportedError,
)
from trimtab.models.load import Base
from trimtab.optim.params import AdamParams, Memory

Owners = Who | Sequence[Who]
"""One adapter (or None, the bare base) for all, or one for each datum or prompt."""


class Engine:
    """Trains and answers with the adapters attached to one base.

    Args:
        base: a loaded base, or a transformers model with ``tokenizer``.
        micro_tokens: the most cells of a micro-batch, in training; what bounds its memory.
        sample_tokens: the most cells (prompt and answer) of a batch that answers.
        packed: force documents to share rows, or not to; None takes what costs less.
        device: the kind of device that micro-batches are to suit, where it is not the model's own (planning).
        memory: what training keeps where, and what it computes again (`trimtab.engine.saving`).
        budgets: the most bytes of adapters that are attached, in slots, and waiting in host memory (`tiers`).
        folder: where adapters go that leave host memory and have no folder, or are newer than it; without it they stay.

    Raises:
        ConfigError: memory that is to wait on the host, where the model lies there.
    """

    def __init__(
        self,
        base: Base | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        micro_tokens: int = 2048,
        sample_tokens: int = 8192,
        packed: bool | None = None,
        memory: Memory | None = None,
        budgets: Budgets | None = None,
        folder: str | Path | None = None,
        device: str | None = None,
    ) -> None:
        self.model: PreTrainedModel = base.model if isinstance(base, Base) else base
        self.tokenizer = base.tokenizer if isinstance(base, Base) else tokenizer
        self.micro_tokens = micro_tokens
        self.sample_tokens = sample_tokens
        self.packed = packed
        self.memory = memory or Memory()
        self.memory.check(self.model.device.type)
        self.rooms: Rooms = Unwatched()
        """Told of the parts of each training step (`trimtab.train.profiler`)."""
        self.frozen: Frozen | None = None
        """What keeps hidden states below the adapters; by default they are computed each time."""
        self.tenants = Tenants(self.memory.optimiser)
        budgets = budgets or Budgets()
        self.tiers = tiers_of(self.model, self.tenants, budgets, folder)
        """The adapters that need not be attached: any of them may be named by those who ask for answers."""
        self.answering = Answering(
            self.model, self.tokenizer, self._answering, sample_tokens, budgets.slots, self.tiers
        )
        """What answers: the requests in progress, and their keys and values."""
        anatomy = anatomy_of(self.model)
        if anatomy.encoder_decoder:
            raise UnsupportedError(
                f"{type(self.model).__name__} is an encoder-decoder; the engine trains decoders and encoders "
                "so far. Train it with its own loss: attach the adapter and use any loop."
            )
        self.causal = anatomy.causal
        with scope(self.model, Route.everyone(())):
            classes = ClassHead.of(self.model)
            self._head: Head = classes or TokenHead.of(self.model)
            pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
            pad = pad if classes is None else classes.pad_id
            self._layout: Layout = layout_of(
                self.model, causal=self.causal, pad_id=int(pad or 0), device=device
            )
        self.labels = self._head.labels
        """Names of the classes, of a sequence classifier; of any other model none."""

    # -- training ------------------------------------------------------------------------------------

    def forward_backward(
        self,
        data: Sequence[Datum],
        adapter: str | Sequence[str],
        loss: Aim | Sequence[Aim] = "cross_entropy",
    ) -> LossResult:
        """Add the gradient of the losses of ``data`` to each datum's adapter.

        ``loss`` is one for all, or one for each datum: a name, a `CrossEntropy`, or a value of `trimtab.losses`.
        Gradients are sums; `optim_step` divides them once, by what the data count: the weight of their tokens, or one
        for a pair of preferences. A method's auxiliary losses are added once per forward, times what its data in that
        forward count.

        A loss that is not finite concerns its adapter alone, whose gradients of the step in progress are dropped while
        its tensors and its optimiser stay as they were. Where the data are of several adapters, the others get the
        gradients that they would get without it, and ``errors`` of the result says what was wrong; where they are of
        one, that is raised.

        Raises:
            NonFiniteLossError: names the examples; only where all data are of one adapter.
            DataError: a datum longer than the model's context, or than a micro-batch; or one that lacks what its loss
                needs. No gradient has changed then.
        """
        owners = self._each(data, adapter)
        tenants = {owner: self._tenant(owner) for owner in dict.fromkeys(owners)}
        aims = self._pass.aims(data, owners, loss)
        try:
            result = self._pass.run(data, owners, aims, train=True)
        except BaseException:
            for tenant in tenants.values():
                tenant.discard()
            raise
        counts = aims.counts(result.weights)
        for owner, tenant in tenants.items():
            if owner in result.errors:
                tenant.discard()
                continue
            own = [index for index, name in enumerate(owners) if name == owner]
            tenant.add(sum(counts[i] for i in own), (data[i].origin for i in own))
        return result

    def check(
        self, data: Sequence[Datum], adapter: Owners, loss: Aim | Sequence[Aim] = "cross_entropy"
    ) -> None:
        """Raise what `forward_backward` would raise for such data before it computes anything."""
        self._pass.aims(data, self._each(data, adapter), loss)

    def micro_batches(self, data: Sequence[Datum], adapter: Owners) -> Iterator[Micro]:
        """The micro-batches in which `forward_backward` would show ``data`` to the model."""
        return self._pass.micro_batches(data, self._each(data, adapter))

    def optim_step(self, adapter: str, params: AdamParams) -> StepResult:
        """One step of one adapter on the gradients accumulated since its last; see `Tenant.step`."""
        self.answering.drain(adapter)
        with self.rooms.inside("optimiser"):
            return self._tenant(adapter).step(params)

    def optimiser_tensors(self, adapter: str) -> list[Tensor]:
        """What the optimiser of an adapter keeps between steps."""
        return self._tenant(adapter).adam.kept

    def admit(self, adapter: str) -> None:
        """Keep an optimiser and a generator for an adapter, which begins from what the process is seeded with now
        instead of when the adapter is first used."""
        self._tenant(adapter)

    def forget(self, adapter: str) -> None:
        """Give back what is kept for an adapter that was detached: its gradients and its optimiser."""
        self.tenants.leave(adapter)

    @contextmanager
    def averaged(self, adapter: str) -> Iterator[None]:
        """The moving averages of an adapter's tensors in their place, inside a ``with`` (see ``AdamParams.ema``);
        the tensors themselves where no average is kept."""
        tenant = self._tenant(adapter)
        self.answering.drain(adapter)
        with tenant.adam.average.acting():
            try:
                yield
            finally:
                self.answering.drain(adapter)

    def take_average(self, adapter: str) -> None:
        """Let the moving averages be the adapter's tensors from now on (nothing changes without any)."""
        self.answering.drain(adapter)
        self._tenant(adapter).adam.average.take()

    def forward(
        self,
        data: Sequence[Datum],
        adapter: Owners = None,
        loss: Aim | Sequence[Aim] = "cross_entropy",
    ) -> LossResult:
        """The losses of ``data`` without gradients, in eval mode: what held-out evaluation uses."""
        owners = self._each(data, adapter)
        return self._pass.run(data, owners, self._pass.aims(data, owners, loss), train=False)

    # -- answering -----------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        adapter: Owners = None,
        *,
        salt: str | None = None,
    ) -> list[Completion]:
        """``params.n`` completions of each prompt (token ids), in the order of the prompts.

        Beginnings of texts that were read for an adapter (or for the bare base) are not read again for it, which can be
        told by the time that an answer takes: users who are to know nothing of each other need a ``salt`` each.

        Adapters are attached ones, or registered in `tiers`. Those wait their turn where there is no room for all.

        Raises:
            DataError: a prompt that is empty, too long to leave room for ``max_tokens`` in the context, or of tokens
                that the vocabulary does not have.
            UnknownNameError: an adapter that is neither attached nor registered.
            FileFormatError, AttachError, ConfigError: what is wrong with a registered adapter that had to come.
        """
        params = params or SamplingParams()
        owners = self._named(prompts, adapter)
        self._check_prompts(prompts, owners, params)
        return self.answering.sample(prompts, owners, params, salt) if prompts else []

    def requests(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, adapter: Who = None, *,
        salt: str | None = None,
    ) -> list[Request]:  # fmt: skip
        """``params.n`` requests for each prompt, which `answering`'s turns answer; none where those answers are not
        made in turns (`sample` makes them all the same). Raises as `sample`."""
        self._check_prompts(prompts, self._named(prompts, adapter), params)
        return self.answering.submitted(prompts, params, adapter, salt)

    def classify(self, texts: Sequence[Sequence[int]], adapter: Owners = None) -> list[list[float]]:
        """The probability of each class (in the order of `labels`) for each text (token ids).

        Raises:
            UnsupportedError: the model is no sequence classifier.
            DataError: a text that is empty, or longer than the context.
        """
        head = self._head
        if not isinstance(head, ClassHead):
            raise UnsupportedError(
                f"{type(self.model).__name__} has no classes; load one with task='sequence-classification'."
            )
        owners = self._each(texts, adapter)
        data = [
            Datum.classified(ids, 0, origin=f"text {number}") for number, ids in enumerate(texts)
        ]
        return self._pass.classes(head, data, owners)

    def stream(
        self, prompt: Sequence[int], params: SamplingParams | None = None, adapter: Who = None, *,
        salt: str | None = None,
    ) -> Stream:  # fmt: skip
        """One completion in pieces of text, as they are made; joined, they are what `sample` gives.

        Nothing is computed until the first piece is asked for, and nothing after the stream is closed or left.

        Raises:
            DataError: as `sample`; `ConfigError` where ``params.n`` is not 1.
        """
        params = params or SamplingParams()
        (owner,) = self._named([prompt], adapter)
        self._check_prompts([prompt], [owner], params)
        return self.answering.stream(prompt, params, owner, salt)

    def _check_prompts(
        self, prompts: Sequence[Sequence[int]], owners: Sequence[Who], params: SamplingParams
    ) -> None:
        """Raise `DataError` for what cannot be answered."""
        if self.labels:
            raise UnsupportedError(
                f"{type(self.model).__name__} gives classes and no text; use classify."
            )
        for number, (prompt, owner) in enumerate(zip(prompts, owners, strict=True)):
            length, what = len(prompt) + params.max_tokens, f"prompt {number} with max_tokens"
            limits.check_length(self.model, length, self.answering.adapters.methods(owner), what)
            if not prompt:
                raise DataError(f"prompt {number} is empty; a model needs at least one token.")
            limits.check_ids(self.model, prompt, f"prompt {number}")

    @contextmanager
    def _answering(self, route: Route, plan: Plan | None) -> Iterator[None]:
        with self._mode(train=False), self._scope(route, plan):
            yield

    # -- state ---------------------------------------------------------------------------------------

    def save(
        self, adapter: str, folder: str | Path, extra: Mapping[str, Any] | None = None
    ) -> Path:
        """Write all that training of ``adapter`` needs to go on exactly; ``extra`` is the caller's JSON."""
        state.write(self._tenant(adapter), Path(folder), extra or {})
        return Path(folder)

    def load(self, folder: str | Path, adapter: str | None = None) -> dict[str, Any]:
        """Take up a saved state, attaching the adapter if no such is attached; returns ``extra``.

        Its random numbers continue where they were. Raises `FileFormatError`, `AttachError`.
        """
        saved = state.read(Path(folder))
        name = adapter or saved.adapter.name
        bank = find_bank(self.model)
        if bank is None or name not in bank.adapters:
            attach(self.model, saved.adapter, name)
        self.answering.drain(name)
        state.restore(self._tenant(name), saved)
        return saved.extra

    # -- who acts, and how ---------------------------------------------------------------------------

    def _each(self, items: Sequence[Any], adapter: Owners) -> list[Any]:
        """One owner per item, each of them attached."""
        owners = _owners(items, adapter)
        for name in dict.fromkeys(owners):
            if name is not None:
                bank_of(self.model).require(name)
        return owners

    def _named(self, items: Sequence[Any], adapter: Owners) -> list[Who]:
        """One owner per item, each of them attached or registered."""
        owners = _owners(items, adapter)
        for name in dict.fromkeys(owners):
            if name is not None:
                self.answering.adapters.check(name)
        return owners

    def _tenant(self, name: str) -> Tenant:
        return self.tenants.of(bank_of(self.model).require(name))

    def context(self, owner: Who = None) -> int | None:
        """The most tokens of one example: the model's positions, less those that a method takes."""
        return limits.context(self.model, self.answering.adapters.methods(owner))

    @property
    def _pass(self) -> Pass:
        return Pass(
            self.model, self._head, self._layout, self.memory, self.rooms, self.frozen,
            self.micro_tokens, self.packed, self.tenants.generators,
        )  # fmt: skip

    def _mode(self, *, train: bool) -> AbstractContextManager[None]:
        return mode(self.model, train=train)

    def _scope(self, route: Route, plan: Plan | None = None) -> AbstractContextManager[None]:
        return scope(self.model, route, plan)


def _owners(items: Sequence[Any], adapter: Owners) -> list[Any]:
    """One owner per item."""
    given = isinstance(adapter, str) or adapter is None
    owners: list[Any] = [adapter] * len(items) if given else list(adapter or ())
    if len(owners) != len(items):
        raise RouteError(
            f"{len(owners)} adapters were named for {len(items)} items; name one, or one for each."
        )
    return owners
