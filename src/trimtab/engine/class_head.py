"""The loss of a model that gives one row of logits for a whole text: a sequence classifier.

    loss = Σ_n w_n · −log softmax(z_n)[c_n],   z_n the logits of text n, c_n the number of its class

The model pools what it pools (BERT its first token, a decoder its last one that is not padding). A text and its
class are one `Datum.classified`, so that feeds, batches, routes and weights are those of any other datum; each
text has a row of its own.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.adapt.acting import using
from trimtab.data import Datum
from trimtab.engine.head import Forms, Head, Kept, formed, uncached
from trimtab.errors import DataError, ModelError, UnsupportedError
from trimtab.losses import TokenLoss, weighted_cross_entropy


@final
class ClassHead(Head):
    """``labels`` are the names of the classes, ``pad_id`` the token that this model takes for padding."""

    def __init__(self, model: nn.Module, labels: tuple[str, ...], pad_id: int | None) -> None:
        self._model = model
        self.labels = labels
        self.pad_id = pad_id

    @classmethod
    def of(cls, model: nn.Module) -> ClassHead | None:
        """Look at a model, with no adapter acting; None where it is no sequence classifier.

        Raises:
            UnsupportedError: a head for regression, or for several labels of one text.
            ModelError: its padding token is not known.
        """
        if not _pools(model):
            return None
        config: Any = model.config
        kind = config.problem_type
        if config.num_labels < 2 or kind not in (None, "single_label_classification"):
            raise UnsupportedError(
                f"{type(model).__name__} has {config.num_labels} label{'s' * (config.num_labels != 1)}"
                f"{f' ({kind})' if kind else ''}; the engine trains heads that tell two classes or more apart, one "
                "for each text, so far. Train it with its own loss: attach the adapter and use any loop."
            )
        pad = config.get_text_config().pad_token_id
        if pad is None:
            raise ModelError(
                f"{type(model).__name__} finds the end of a text by its padding token, and its config has none; set "
                "model.config.pad_token_id (trimtab.load does)."
            )
        names = tuple(str(config.id2label[number]) for number in range(config.num_labels))
        return cls(model, names, int(pad))

    def check(self, datum: Datum) -> None:
        what = datum.origin or "an example"
        if any(datum.weights[:-1]):
            raise DataError(
                f"{what} has weights within its text; a classifier learns one class for the whole: "
                "Datum.classified(ids, number)."
            )
        if not 0 <= datum.targets[-1] < len(self.labels):
            raise DataError(
                f"{what}: there is no class {datum.targets[-1]}; the model has {len(self.labels)}: "
                f"{', '.join(self.labels[:8])}{', …' * (len(self.labels) > 8)}."
            )
        if datum.tokens[-1] == self.pad_id:
            raise DataError(
                f"{what} ends with the padding token ({self.pad_id}), which the model would not see as text; take "
                "it off, or give the model another padding token."
            )

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, C), one row for each text."""
        found: Tensor = self._model(**inputs, **uncached(self._model)).logits
        return found

    def loss(
        self, inputs: dict[str, Tensor], kept: Kept, forms: Forms, *, together: bool
    ) -> TokenLoss:
        rows = kept.index // inputs["input_ids"].shape[1]
        return formed(self.logits(inputs)[rows], kept, forms, weighted_cross_entropy)


def labels_of(model: nn.Module) -> tuple[str, ...]:
    """The names of a sequence classifier's classes (of any other model none); adapters are attached to it."""
    with using(model, None):
        found = ClassHead.of(model)
    return () if found is None else found.labels


@torch.no_grad()
def _pools(model: nn.Module) -> bool:
    """Whether the model gives one row of logits for a text: seen on a few tokens."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is not None:
        return False
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    training = model.training
    try:
        model.eval()
        return bool(model(input_ids=ids, **uncached(model)).logits.dim() == 2)
    except (AttributeError, TypeError, ValueError):
        return False
    finally:
        model.train(training)
