"""PEFT's names of errors and warnings: those that code catches are `trimtab.errors`."""

from trimtab.errors import TargetError as NoMatchingPeftModuleError
from trimtab.errors import TrimtabError as PeftError


class PeftWarning(UserWarning):
    """What the face warns of, so that it can be filtered by PEFT's name."""


__all__ = ["NoMatchingPeftModuleError", "PeftError", "PeftWarning"]
