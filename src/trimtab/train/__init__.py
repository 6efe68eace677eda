"""From a recipe to a finished run: plan, loop, checkpoints, events, report. No torch until a run starts.

``trimtab.train`` is this room and, called, the function `trimtab.train.api.train`: the import system
binds a room's name in the package, so the name has to be both.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from trimtab.train.api import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
