"""Public benchmarks and tasks of one's own, through lm-eval's Python API. lm-eval is an optional extra."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trimtab.engine import Engine
from trimtab.errors import ConfigError, DataError, TrimtabError, UnknownNameError, suggest
from trimtab.evals.evaluate import Evaluation
from trimtab.evals.intervals import Interval, Z, wilson
from trimtab.models.load import Base

BOOTSTRAPS = 1000
FEWSHOT_SEED = 1234
"""lm-eval's own, so that prompts are those of published numbers."""


def evaluate_tasks(
    base: Base,
    tasks: Sequence[str],
    adapters: Sequence[str | None] = (None,),
    *,
    include: Path | str | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
) -> list[Evaluation]:
    """Run tasks of lm-eval with each adapter of ``base`` acting (None: the bare base).

    Args:
        tasks: names of tasks, groups or tags, as ``lm-eval ls tasks`` lists them.
        include: a folder with task files (YAML) of one's own; they come before those of lm-eval.
        limit: how many of the first documents of each task.
        fewshot: examples in the prompt; None is what each task says.
        chat: put each prompt into the model's chat template.

    Returns:
        The values by ``"task metric"`` (``"task metric filter"`` where a task filters answers in several ways).
        A share of documents has Wilson's interval; what else has a standard error has value ± 1.96 of it;
        what has none has an interval of NaN.

    Raises:
        ConfigError: lm-eval is not installed.
        UnknownNameError: no such task; near names are suggested.
        DataError: a task file or its data cannot be read (lm-eval's own tasks need a network the first time).
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "tasks need lm-eval, which is not installed; pip install 'trimtab[lm-eval]'."
        )
    with _hushed():
        loaded = _load(tasks, include, fewshot)
        engine = Engine(base)
        return [_run(engine, name, loaded, limit, chat) for name in adapters]


def _load(tasks: Sequence[str], include: Path | str | None, fewshot: int | None) -> Any:
    """The tasks and groups, as lm-eval's `evaluate` takes them."""
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        raise ConfigError(f"{str(include)!r} is not a folder of task files.")
    if not tasks:
        raise ConfigError("name at least one task.")
    manager = None
    if include is not None:  # reading the index of lm-eval's own tasks takes a while
        manager = TaskManager(include_path=str(include), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if include is None else str(include))
    for name in tasks:
        if name not in manager.all_tasks:
            hint = suggest(name, manager.all_tasks) or " `lm-eval ls tasks` lists them."
            raise UnknownNameError(f"unknown task {name!r}.{hint}")
    try:
        loaded = manager.load(list(dict.fromkeys(tasks)))
    except TrimtabError:
        raise
    except Exception as error:  # whatever a task file, a data set or the network can do
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"the data of {', '.join(tasks)} cannot be read: {reason[0]} (lm-eval's own tasks need a network the first "
            "time; a task file names its data by path or id.)"
        ) from error
    for task in loaded["tasks"].values():
        # As lm-eval's own command does it: a task that says 0 stays at 0.
        said = task.get_config("num_fewshot")
        if said is None or (fewshot is not None and said != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
    return loaded


def _run(
    engine: Engine, adapter: str | None, loaded: Any, limit: int | None, chat: bool
) -> Evaluation:
    from lm_eval import evaluate

    from trimtab.evals.harness import EngineLM

    began = time.perf_counter()
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples for everyone
    results = evaluate(
        EngineLM(engine, adapter),
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=BOOTSTRAPS,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
    )
    found: dict[str, Interval] = {}
    for task, values in results["results"].items():
        counts = results["n-samples"].get(task, {})
        found |= _values(task, values, results["samples"].get(task, []), counts.get("effective", 0))
    return Evaluation(adapter, metrics=found, seconds=time.perf_counter() - began)


def _values(
    task: str, values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], count: int
) -> dict[str, Interval]:
    """The metrics of one task; their keys are ``metric,filter``."""
    found: dict[str, Interval] = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = f"{task} {metric}" if kind == "none" else f"{task} {metric} {kind}"
        of_filter = [one for one in samples if one.get("filter", "none") == kind]
        each = [one.get(metric) for one in of_filter]
        error = values.get(f"{metric}_stderr,{kind}")
        if each and all(isinstance(one, int | float) and one in (0, 1) for one in each):
            found[name] = wilson(sum(map(int, each)), len(each))  # type: ignore[arg-type]
        else:
            spread = Z * error if isinstance(error, int | float) else float("nan")
            found[name] = Interval(
                float(value), float(value - spread), float(value + spread), count
            )
    return found


@contextmanager
def _hushed() -> Iterator[None]:
    """Without lm-eval's progress in the log; its warnings stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
