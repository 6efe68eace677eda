"""Optuna chooses the variants of a sweep: tree-structured Parzen estimators, which learn from round to round.

A variant that was stopped early counts as pruned at that step, with its loss there; one that failed counts as that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from trimtab.errors import MissingPackageError
from trimtab.train.sweep.config import SweepConfig
from trimtab.train.sweep.samplers import TRIES, Sampler
from trimtab.train.sweep.space import Axis, Between, Choice, Listed, Whole

ROUNDS = 4
"""Rounds into which its variants are parted where nothing else is said: it learns nothing within one."""


@final
class Optuna(Sampler):
    """Asks a study that lives in memory: the same seed and the same losses make the same study again.

    Raises:
        MissingPackageError: optuna is not installed.
    """

    def __init__(self, axes: Mapping[str, Axis], config: SweepConfig) -> None:
        super().__init__(axes, config)
        try:
            import optuna
        except ImportError as error:
            raise MissingPackageError(
                f"the sampler optuna needs a package that is not installed ({error}): pip install 'trimtab[optuna]'."
            ) from error
        self._states = optuna.trial.TrialState
        self._count = config.count or 0
        self._size = config.together or -(-self._count // ROUNDS)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            direction="minimize",
            sampler=optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=self._size),
        )
        self._trials: list[tuple[Choice, Any]] = []

    def ask(self) -> list[Choice]:
        size = min(self._size, self._count - len(self._trials))
        found: list[Choice] = []
        for _ in range(TRIES * size):
            if len(found) == size:
                break
            trial = self._study.ask()
            choice = {key: self._suggested(trial, key, axis) for key, axis in self.axes.items()}
            if any(choice == known for known, _ in self._trials):
                self._study.tell(trial, state=self._states.FAIL)
                continue
            self._trials.append((choice, trial))
            found.append(choice)
        return found

    def tell(self, choice: Choice, step: int, loss: float | None, *, whole: bool) -> None:
        trial = next(trial for known, trial in self._trials if known == choice)
        if loss is None:
            self._study.tell(trial, state=self._states.FAIL)
            return
        trial.report(loss, step)
        if whole:
            self._study.tell(trial, loss)
        else:
            self._study.tell(trial, state=self._states.PRUNED)

    def _suggested(self, trial: Any, key: str, axis: Axis) -> Any:
        match axis:
            case Listed(values):  # by their places: optuna takes few types of values
                return values[trial.suggest_categorical(key, list(range(len(values))))]
            case Between(low, high, log):
                return axis.rounded(trial.suggest_float(key, low, high, log=log))
            case Whole(low, high):
                return trial.suggest_int(key, low, high)
        raise TypeError(f"optuna cannot choose from {axis!r}.")
