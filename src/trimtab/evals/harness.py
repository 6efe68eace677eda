"""Tasks of lm-eval (EleutherAI's Language Model Evaluation Harness), answered by our engine.

`EngineLM` gives lm-eval what it asks of a model: log-likelihoods of continuations, of whole texts, and
generated text. Texts become tokens, and too long ones are cut on the left, as lm-eval's own `HFLM` does it, so
that the numbers are comparable with published ones. Import this module only where lm-eval is installed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, final

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import track

from trimtab.data import Datum
from trimtab.engine import Engine, SamplingParams
from trimtab.errors import ConfigError, DataError

MOST_TOKENS = 256
"""Tokens of an answer where the task does not say, as in HFLM."""
LONGEST = 2048
"""Tokens of an input where the model does not say, as in HFLM."""
PART = 256
"""Requests between two steps of the progress bar."""
SAMPLING = {"temperature", "top_p", "top_k", "seed"}
IGNORED = {"do_sample", "use_cache", "num_beams"}


@final
class EngineLM(TemplateLM):  # type: ignore[misc]
    """One adapter of an engine, or the bare base (None), as lm-eval sees a model."""

    def __init__(self, engine: Engine, adapter: str | None) -> None:
        super().__init__()
        if engine.tokenizer is None:
            raise DataError("lm-eval's tasks are text: Engine(model, tokenizer).")
        if not engine.causal:
            raise ConfigError(
                "lm-eval's tasks ask for the probability of what follows: a causal model is needed."
            )
        self.tokenizer = engine.tokenizer
        self._engine = engine
        self._adapter = adapter
        self._longest = engine.context(adapter) or LONGEST

    # -- text and tokens -------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; a text that writes out its begin token gets no second one."""
        special = add_special_tokens
        if special is None:
            special = not string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=special, verbose=False)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    # -- what is asked ---------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is the greedy answer) of each continuation."""
        data = [self._datum(context, answer) for _, context, answer in requests]
        if not data:
            return []
        self._engine.micro_tokens = max(self._engine.micro_tokens, *map(len, data))
        found = [(0.0, False)] * len(data)
        for part in _in_parts([len(datum) for datum in data], "likelihoods"):
            result = self._engine.forward([data[place] for place in part], self._adapter)
            rows = zip(part, result.sums, result.hits, result.weights, strict=True)
            for place, nll, hits, weight in rows:
                found[place] = (-nll, hits == weight)
        return found

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-probability in nats of each whole text, in windows as long as the context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._longest,
                context_len=1,
            )
            for pair in map(make_disjoint_window, pairs):
                windows.append((None, *pair))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _greedy) in zip(
            owners, self._loglikelihood_tokens(windows), strict=True
        ):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """The text that follows each context, up to the task's stop strings."""
        alike: dict[SamplingParams, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[self._params(request.args[1])].append(number)
        found = [""] * len(requests)
        for params, members in alike.items():
            room = self._longest - params.max_tokens
            if room < 1:
                raise ConfigError(
                    f"a task asks for {params.max_tokens} tokens, and the model's context is {self._longest}."
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in members]
            for part in _in_parts([len(prompt) for prompt in prompts], "answers"):
                chosen = [prompts[place] for place in part]
                answers = self._engine.sample(chosen, params, self._adapter)
                for place, answer in zip(part, answers, strict=True):
                    found[members[place]] = answer.text
        return found

    def _datum(self, context: list[int], answer: list[int]) -> Datum:
        if len(answer) > self._longest:
            raise DataError(
                f"a task's continuation has {len(answer)} tokens, more than the context of {self._longest}."
            )
        ids = [*context, *answer][-(self._longest + 1) :]
        weights = [0.0] * (len(ids) - len(answer)) + [1.0] * len(answer)
        return Datum.causal(ids, weights)

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        options = dict(normalize_gen_kwargs(given, MOST_TOKENS))
        stops = handle_stop_sequences(
            options.pop("until", None), eos=str(self.tokenizer.decode([self.eot_token_id]))
        )
        most = options.pop("max_gen_toks")
        drawn = options.get("do_sample", False)
        unknown = sorted(options.keys() - SAMPLING - IGNORED)
        if unknown or options.get("num_beams", 1) != 1:
            raise ConfigError(
                f"a task asks for the generation option {(unknown or ['num_beams'])[0]!r}, which the engine does not "
                f"have. It has: {', '.join(sorted(SAMPLING))}."
            )
        chosen = {key: options[key] for key in SAMPLING & options.keys()} if drawn else {}
        return SamplingParams.parse(
            {"temperature": 0.0, **chosen, "max_tokens": most, "stop": [s for s in stops if s]}
        )


def _in_parts(lengths: Sequence[int], what: str) -> Iterator[list[int]]:
    """Indices, those of like length together and the longest first; with a bar where there are many."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    parts = [order[start : start + PART] for start in range(0, len(order), PART)]
    console = Console(stderr=True)
    quiet = len(parts) == 1 or not console.is_terminal
    return iter(track(parts, what, console=console, transient=True, disable=quiet))
