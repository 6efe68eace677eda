"""Each text goes through the frozen lower blocks once: what they give is kept on disk, and later forwards begin there.

The states of a text are those of the first micro-batch that it was in. Where it is laid out in the same way again they
are what the blocks would give, bit for bit; beside other texts, or in rows of another width, a product of matrices may
round otherwise, and there they differ by that rounding (as do two layouts without a cache). Cells of padding, which
nothing that is learnt looks at, are zero.

A folder of states is named by all that they depend on: every tensor below, the config, how layers are stored, the
dtype, the number of blocks, attention, device, and the versions of torch and transformers.

Shapes: B rows, T tokens, C the width of the hidden states.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.bank import bank_of, find_bank
from trimtab.adapt.fingerprint import storage_of
from trimtab.adapt.route import Route
from trimtab.adapt.tree import anatomy_of
from trimtab.data import Datum
from trimtab.engine.lower import Lower, below, lowest
from trimtab.engine.micro import Micro
from trimtab.engine.states import SCHEMA, StateFiles, forget_old, key_of
from trimtab.errors import UnsupportedError

UNSAID = frozenset(
    {
        "_name_or_path", "architectures", "id2label", "label2id", "num_labels", "problem_type", "transformers_version",
        "use_cache",
    }
)  # fmt: skip
"""What a config says that changes no hidden state."""


def hidden_cache() -> Path:
    """The folder of hidden states: ``trimtab/hidden`` in the user's cache folder (``$XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "hidden"


class Frozen:
    """The hidden states below one adapter of a model, and every other adapter that acts no lower.

    Args:
        folder: where folders of states lie; None is `hidden_cache`.
        note: told in a sentence what is torn, and when the disk refuses.

    Raises:
        UnsupportedError: nothing lies below, or it cannot be left out (`trimtab.engine.lower`).
        StorageError: the folder cannot be made.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: Adapter,
        *,
        folder: Path | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model = model
        self.lower: Lower = below(model, adapter)
        self._known: dict[str, tuple[Adapter, bool]] = {adapter.name: (adapter, True)}
        self._divides = bool(anatomy_of(model).apart)
        root = folder or hidden_cache()
        forget_old(root)
        self.files = StateFiles(
            root / _name(model, self.lower), self.lower.width, self.lower.dtype, note
        )

    @contextmanager
    def around(self, micro: Micro, route: Route, data: Sequence[Datum]) -> Iterator[None]:
        """A forward of ``micro`` inside begins above the frozen blocks, where the states of all its texts are known;
        else they are kept from it."""
        if not self._serves(micro, route):
            yield
            return
        texts = [data[member].tokens for member in micro.members]
        states = self._states(micro, texts)
        if states is not None:
            with self.lower.replaced(states.to(self.model.device)):
                yield
            return
        caught: list[Tensor] = []
        with self.lower.caught(lambda given: caught.append(given.clone())):
            yield
        if len(caught) == 1 and caught[0].shape[:2] == micro.batch.input_ids.shape:
            self._keep(micro, texts, caught[0])

    def close(self) -> None:
        """Let go of the files."""
        self.files.close()

    def _serves(self, micro: Micro, route: Route) -> bool:
        """Whether everyone who acts here acts above, and the model sees all rows at once."""
        owners, bank = dict.fromkeys(micro.owners), find_bank(self.model)
        if (bank is not None and bank.merged) or (self._divides and not route.every):
            return False
        return all(owner is None or self._above(owner) for owner in owners)

    def _above(self, name: str) -> bool:
        adapter = bank_of(self.model).require(name)
        known = self._known.get(name)
        if known is None or known[0] is not adapter:
            try:
                fits = lowest(self.model, adapter) >= len(self.lower.blocks)
            except UnsupportedError:
                fits = False
            known = self._known[name] = adapter, fits
        return known[1]

    def _states(self, micro: Micro, texts: Sequence[Sequence[int]]) -> Tensor | None:
        """(B, T, C), if those of all texts are known."""
        keys = [key_of(tokens) for tokens in texts]
        if not all(key in self.files for key in keys):
            return None
        rows, width = micro.batch.input_ids.shape
        laid = torch.zeros(rows, width, self.files.row, dtype=torch.uint8)
        cells = laid.numpy()
        for key, document in zip(keys, micro.batch.documents, strict=True):
            found = self.files.get(key, document.stop - document.start)
            if found is None:
                return None
            cells[document.row, document.start : document.stop] = found
        return laid.view(self.files.dtype)

    def _keep(self, micro: Micro, texts: Sequence[Sequence[int]], states_BTC: Tensor) -> None:
        for tokens, document in zip(texts, micro.batch.documents, strict=True):
            own = states_BTC[document.row, document.start : document.stop]
            if bool(own.isfinite().all()):
                self.files.add(key_of(tokens), own)


# -- what the states depend on ------------------------------------------------------------------------


def _name(model: PreTrainedModel, lower: Lower) -> str:
    """Of the folder of what these blocks give."""
    anatomy, count = anatomy_of(model), len(lower.blocks)
    above = (*anatomy.blocks[count:], *anatomy.head)
    own = {
        path: module
        for path, module in anatomy.modules.items()
        if not any(path == one or path.startswith(f"{one}.") for one in above)
    }
    said = {
        "schema": SCHEMA,
        "model": type(model.base_model).__name__,
        "blocks": count,
        "dtype": str(lower.dtype),
        "config": _said(model.config.to_dict()),
        "storage": storage_of(own),
        "attention": model.config._attn_implementation,
        "device": model.device.type,
        "versions": [torch.__version__, transformers.__version__],
        "weights": _content(own),
    }
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _said(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _said(value) for key, value in config.items() if key not in UNSAID}
    return config


def _content(modules: dict[str, nn.Module]) -> str:
    """SHA-256 of all tensors of these modules.

    Raises:
        UnsupportedError: some are kept in a form that cannot be read byte by byte.
    """
    content = hashlib.sha256()
    for path, module in modules.items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
                raise UnsupportedError(
                    f"{path}.{name} is a {type(tensor).__name__}, whose bytes cannot be compared with another's."
                )
            content.update(f"{path}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            content.update(flat.numpy().data)
    return content.hexdigest()
