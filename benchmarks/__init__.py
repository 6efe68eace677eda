"""Trimtab beside its peers: `python -m benchmarks` measures, prints and writes results.

A benchmark is one file: the sides (objects with a ``step``), and what to report of them. `core` runs
sides in turns and forms ratios, `report` writes them, `matmul` says what this machine can do at all.
"""
