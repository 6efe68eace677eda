"""Views of frozen layers: one file per kind or storage backend."""

from trimtab.frozen.layer import Layer, Push, layers, stamp, view

__all__ = ["Layer", "Push", "layers", "stamp", "view"]
