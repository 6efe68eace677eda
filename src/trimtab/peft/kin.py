"""How libraries that ask for PEFT's classes know ours: where ``peft`` is installed, by inheritance.

`Trainer`, TRL and accelerate ask ``isinstance(model, peft.PeftModel)`` and ``isinstance(config, peft.PeftConfig)``.
`related` makes a class a subclass of PEFT's class of the same name; everything public is our own (a test sees to it),
so nothing of PEFT's runs. PEFT's abstract classes take ours by ``register``, which is what it is for.

TRL's trainers hand a ``peft_config`` to ``peft.get_peft_model`` itself, which looks up the tuner of
``config.peft_type`` in the table ``peft.PEFT_TYPE_TO_TUNER_MAPPING``. Our types have names of their own there
(`trimtab.peft.types.PeftType`), so such a model has our tuner inside (`trimtab.peft.guest`). Nothing that PEFT has is
changed, and without ``peft`` none of this is needed or done.
"""

from __future__ import annotations

from abc import ABCMeta
from importlib import import_module
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


def _installed() -> Any:
    try:
        return import_module("peft")
    except ImportError:
        return None


THEIRS: Any = _installed()
"""The package ``peft``, or None."""


def related(cls: C) -> C:
    """A class decorator: a subclass of PEFT's class of that name too, where there is one."""
    theirs = getattr(THEIRS, cls.__name__, None)
    if theirs is None:
        return cls
    names = ("__module__", "__qualname__", "__doc__")
    return type(cls)(cls.__name__, (cls, theirs), {name: getattr(cls, name) for name in names})


def register(cls: type, name: str) -> None:
    """Make a class a virtual subclass of PEFT's tuner of that name, or abstract class, where there is one.

    It inherits nothing so.
    """
    places = () if THEIRS is None else (THEIRS, THEIRS.tuners.tuners_utils)
    theirs = next((found for place in places if (found := getattr(place, name, None))), None)
    if isinstance(theirs, ABCMeta):
        theirs.register(cls)


def enter(peft_type: str, tuner: type, prefix: str) -> None:
    """Put a type of ours into the tables by which ``peft.get_peft_model`` finds its tuner.

    Not into the table by which PEFT reads folders: one that names a type of ours is in a form that PEFT has not, so
    it goes on refusing it.
    """
    if THEIRS is not None:
        THEIRS.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner
        THEIRS.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix
