"""PEFT methods: one file each, on top of `trimtab.adapt.contract`."""
