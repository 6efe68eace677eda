"""Initialisations of low-rank factors: one file each, on top of `trimtab.adapt.initial`."""
