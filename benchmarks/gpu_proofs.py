"""The proof of each kernel of `benchmarks.gpu`: equal to its plain twin on this device, and how long both take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.dequantise import eight_bit_ways, four_bit_ways
from benchmarks.gpu_sides import PLACES
from trimtab.adapt.documents import Documents
from trimtab.kernels import frozen_blocks, varlen
from trimtab.kernels.accelerators import triton_for
from trimtab.losses.cross_entropy import linear_cross_entropy, weighted_cross_entropy

PLAIN = "plain torch"


class Kernels:
    """The side that compares."""

    def __init__(self, device: str, shape: Mapping[str, int]) -> None:
        self.place, self.shape = PLACES[device](), shape

    def prove(self, tokens: int, repeat: int) -> list[dict[str, Any]]:
        """A line for each kernel, shape and way but the plain one."""
        found = [line for shape in self._shapes() for line in self._weights(shape, repeat)]
        found += [*self._blocks(tokens, repeat), *self._attention(tokens, repeat)]
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

    def _blocks(self, tokens: int, repeat: int) -> list[dict[str, Any]]:
        """Frozen norms, of hidden states and of heads, and gated products: forward and backward by Triton."""
        if not triton_for(torch.empty(0, device=self.place.name)):
            return []
        width, inner = self.shape["hidden_size"], self.shape["intermediate_size"]
        heads = self.shape["num_attention_heads"]
        works: list[tuple[str, tuple[int, ...], int, Callable[..., Tensor]]] = []
        for rounding in ("before", "after", "offset"):
            for shape in ((tokens, width), (tokens, heads, width // heads)):
                weight = torch.randn(shape[-1], device=self.place.name).bfloat16()
                norm = partial(
                    frozen_blocks.rms_norm, weight_C=weight, epsilon=1e-5, rounding=rounding
                )
                works.append((f"frozen norm, {rounding}", shape, 1, norm))
        for name, activation in (
            ("SiLU", F.silu),
            ("GELU", F.gelu),
            ("tanh-GELU", partial(F.gelu, approximate="tanh")),
        ):
            gated = partial(frozen_blocks.gated_product, activation=activation)
            works.append((f"gated product, {name}", (tokens, inner), 2, gated))
        lines = []
        for kernel, shape, count, work in works:
            run = self._differentiated(work, [shape] * count, shape)
            found, ms = run(), self._ms(run, repeat)
            with patch.object(frozen_blocks, "triton_for", lambda _: False):
                plain, before = run(), self._ms(run, repeat)
            lines.append(_line(kernel, shape, "Triton", found, plain, ms, before))
        return lines

    def _attention(self, tokens: int, repeat: int) -> list[dict[str, Any]]:
        """Eight documents of a row, told to torch's kernel, beside torch's attention under a mask."""
        heads, groups = (self.shape[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
        width = self.shape["hidden_size"] // heads
        shapes = [(1, count, tokens, width) for count in (heads, groups, groups)]
        if not varlen.takes(*(torch.empty(s, device=self.place.name).bfloat16() for s in shapes)):
            return []
        documents = Documents(tuple(tokens * (number + 1) // 8 for number in range(8)))
        device = torch.device(self.place.name)
        starts, mask = documents.starts(device), documents.mask(1, tokens, device)

        def told(*given: Tensor) -> Tensor:
            return varlen.documents_attention(*given, width**-0.5, starts, documents.longest)

        def masked(*given: Tensor) -> Tensor:
            q, k, v = given
            k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

        runs = [
            self._differentiated(way, shapes, (1, tokens, heads, width)) for way in (told, masked)
        ]
        found, plain = (run() for run in runs)
        ms, before = (self._ms(run, repeat) for run in runs)
        shape = (tokens, heads, groups, width)
        return [_line("attention in documents", shape, "torch's kernel", found, plain, ms, before)]

    def _differentiated(
        self, work: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], out: tuple[int, ...]
    ) -> Callable[[], list[Tensor]]:
        """What gives the result and the gradients of some random bf16 tensors, the same ones each time it is made."""
        torch.manual_seed(0)
        made = [torch.randn(shape, device=self.place.name).bfloat16() for shape in (*shapes, out)]
        given, grad = [tensor.requires_grad_() for tensor in made[:-1]], made[-1]

        def run() -> list[Tensor]:
            y = work(*given)
            return [y.detach(), *torch.autograd.grad(y, given, grad)]

        return run

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


def _line(
    kernel: str, shape: Sequence[int], way: str, found: Sequence[Tensor], plain: Sequence[Tensor], ms: float,
    before: float,
) -> dict[str, Any]:  # fmt: skip
    """Of a kernel whose values may lie a rounding from those of plain torch."""
    pairs = zip(found, plain, strict=True)
    off = max(
        float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs
    )
    return {
        "kernel": kernel, "shape": tuple(shape), "way": way, "ms": ms, "plain_ms": before, "off": off,
        "equal": off <= EPS,
    }  # fmt: skip


EPS = torch.finfo(torch.bfloat16).eps
"""What two roundings to bf16 may lie apart."""
