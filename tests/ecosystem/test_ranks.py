"""Sharded by FSDP2 and replicated by DDP, on two gloo ranks of this CPU."""

from __future__ import annotations

from pathlib import Path

from tests.ecosystem import ranks


def test_two_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    ranks.start(tmp_path)
