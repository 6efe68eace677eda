"""Every error that Trimtab raises on purpose, as one tree.

Each class is also the standard type that a caller would expect, so that ``except ValueError`` goes
on working. A message says what is wrong, where, and what to do.

    TrimtabError
    ├── ConfigError (ValueError)          a value, option or key that does not fit
    │   └── UnknownNameError              a name that nothing has; near names are suggested
    ├── TargetError (ValueError)          a selector that matches nothing, or what cannot hold the method
    ├── AttachError (ValueError)          an adapter that cannot be attached here
    │   ├── DuplicateNameError            that name is taken
    │   └── BaseMismatchError             the adapter was made for another base
    ├── RouteError (ValueError)           it cannot be told who acts on which row
    ├── UnsupportedError (NotImplementedError)   a (method, feature) that mathematics forbids
    │   └── NotMergeableError             the edit is not an affine map of the layer's input
    ├── MergeError (ValueError)           a merge that would leave weights nobody can use
    ├── FileFormatError (ValueError)      a file that is torn, foreign, incomplete or has extra keys
    ├── DataError (ValueError)            a record or an example that cannot be used
    ├── ModelError (ValueError)           a model folder or tokenizer that cannot be used
    ├── MissingPackageError (ImportError) an optional package that is not installed
    ├── StorageError (OSError)            a write that did not succeed; nothing saved before is lost
    └── TrainingError (RuntimeError)      a run that had to stop
        └── NonFiniteLossError            the loss became NaN or infinite
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class TrimtabError(Exception):
    """Root of everything that Trimtab raises on purpose."""


class ConfigError(TrimtabError, ValueError):
    """A value, option or key that does not fit."""


class UnknownNameError(ConfigError):
    """A name that nothing has; the message suggests near ones."""


class TargetError(TrimtabError, ValueError):
    """A selector that matches nothing, or that matches what cannot hold the method."""


class AttachError(TrimtabError, ValueError):
    """An adapter that cannot be attached here."""


class DuplicateNameError(AttachError):
    """The name is taken."""


class BaseMismatchError(AttachError):
    """The adapter was made for another base model."""


class RouteError(TrimtabError, ValueError):
    """It cannot be told which adapter acts on which row."""


class UnsupportedError(TrimtabError, NotImplementedError):
    """A combination that mathematics forbids; the message says why."""


class NotMergeableError(UnsupportedError):
    """The edit is not an affine map of the layer's input, so no weight equals it."""


class MergeError(TrimtabError, ValueError):
    """A merge that would leave weights nobody can use; nothing was changed."""


class FileFormatError(TrimtabError, ValueError):
    """A file that is torn, foreign, incomplete, or has keys nobody asked for."""


class DataError(TrimtabError, ValueError):
    """A record or an example that cannot be used."""


class ModelError(TrimtabError, ValueError):
    """A model folder or tokenizer that cannot be used."""


class MissingPackageError(TrimtabError, ImportError):
    """An optional package that is not installed; the message says how to install it."""


class StorageError(TrimtabError, OSError):
    """A write that did not succeed; what was saved before is intact."""


class TrainingError(TrimtabError, RuntimeError):
    """A run that had to stop."""


class AnswerError(TrimtabError, RuntimeError):
    """A request that could not be answered, or not to its end."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite."""


def suggest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """``" Did you mean 'a' or 'b'?"``, or an empty string when nothing is near."""
    pool = list(dict.fromkeys(known))
    near = get_close_matches(name, pool, n=limit, cutoff=0.55)
    if not near:
        folded = {candidate.lower(): candidate for candidate in pool}
        near = [folded[hit] for hit in get_close_matches(name.lower(), list(folded), n=limit)]
    if not near:
        return ""
    return " Did you mean " + " or ".join(repr(candidate) for candidate in near) + "?"
