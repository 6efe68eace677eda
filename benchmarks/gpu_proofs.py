"""The proof of each kernel of `benchmarks.gpu`: equal to its plain twin on this device, and how long both take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.dequantise import eight_bit_ways, four_bit_ways
from benchmarks.gpu_sides import PLACES
from trimtab.losses.cross_entropy import linear_cross_entropy, weighted_cross_entropy

PLAIN = "plain torch"


class Kernels:
    """The side that compares."""

    def __init__(self, device: str, shape: Mapping[str, int]) -> None:
        self.place, self.shape = PLACES[device](), shape

    def prove(self, tokens: int, repeat: int) -> list[dict[str, Any]]:
        """A line for each kernel, shape and way but the plain one."""
        found = [line for shape in self._shapes() for line in self._weights(shape, repeat)]
        return [*found, self._loss(tokens, repeat)]

    def _shapes(self) -> list[tuple[int, int]]:
        width, inner = self.shape["hidden_size"], self.shape["intermediate_size"]
        narrow = width * self.shape["num_key_value_heads"] // self.shape["num_attention_heads"]
        return [(width, width), (narrow, width), (inner, width), (width, inner)]

    def _weights(self, shape: tuple[int, int], repeat: int) -> list[dict[str, Any]]:
        weight = 0.02 * torch.randn(shape, device=self.place.name)
        lines = []
        for kernel, ways in (
            ("NF4 made dense", four_bit_ways),
            ("INT8 made dense", eight_bit_ways),
        ):
            made = ways(weight, torch.bfloat16)
            plain = made[PLAIN]()
            before = self._ms(made[PLAIN], repeat)
            for way, run in made.items():
                if way == PLAIN:
                    continue
                off = float((run().float() - plain.float()).abs().max() / plain.abs().max())
                # ours is the twin of the plain one; the scales of bitsandbytes may be off by a rounding
                equal = torch.equal(run(), plain) if way == "Triton" else off <= EPS
                lines.append({
                    "kernel": kernel, "shape": shape, "way": way, "ms": self._ms(run, repeat), "plain_ms": before,
                    "off": off, "equal": bool(equal),
                })  # fmt: skip
        return lines

    def _loss(self, tokens: int, repeat: int) -> dict[str, Any]:
        """The loss by chunks, beside all logits at once: how far the gradients of the hidden states lie apart."""
        vocabulary, width, device = (
            self.shape["vocab_size"],
            self.shape["hidden_size"],
            self.place.name,
        )
        hidden = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
        head = (0.02 * torch.randn(vocabulary, width, device=device)).bfloat16()
        targets = torch.randint(vocabulary, (tokens,), device=device)
        weights = torch.ones(tokens, device=device)

        def gradient(loss: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(loss, hidden)
            return found

        def plain() -> Tensor:
            return gradient(weighted_cross_entropy(hidden @ head.T, targets, weights).loss)

        def chunked() -> Tensor:
            return gradient(linear_cross_entropy(hidden, head, targets, weights).loss)

        one, other = chunked().float(), plain().float()
        off = float((one - other).norm() / other.norm())
        return {
            "kernel": "loss by chunks", "shape": (tokens, vocabulary, width), "way": "chunks",
            "ms": self._ms(chunked, repeat), "plain_ms": self._ms(plain, repeat), "off": off, "equal": off <= EPS,
        }  # fmt: skip

    def _ms(self, run: Callable[[], Any], repeat: int) -> float:
        run()
        return 1e3 * statistics.median(self.place.seconds(run) for _ in range(repeat))


EPS = torch.finfo(torch.bfloat16).eps
"""What two roundings to bf16 may lie apart."""
