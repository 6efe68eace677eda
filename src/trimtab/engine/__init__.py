"""The engine: four verbs for one base and any number of adapters on it.

forward_backward(data, adapter, loss)   gradients accumulate, as sums, in each datum's adapter; a loss for each
optim_step(adapter, params)       one step of that adapter alone, divided by what its data count
sample(prompts, params)           completions, each prompt by its own adapter or the bare base
                                  (stream(prompt, params): one of them, piece by piece)
classify(texts, adapter)          of a sequence classifier: the probability of each class
save / load                       weights, optimiser, counts and RNG: exact resume
"""

from trimtab.engine.engine import Engine
from trimtab.engine.memory import keep_memory
from trimtab.engine.results import LossResult, StepResult
from trimtab.engine.sampling import Completion, SamplingParams
from trimtab.engine.streaming import Stream

__all__ = [
    "Completion",
    "Engine",
    "LossResult",
    "SamplingParams",
    "StepResult",
    "Stream",
    "keep_memory",
]
