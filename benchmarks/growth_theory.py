"""What a step of LoRA on all linear layers must cost: operations and bytes as functions of the sizes of a decoder.

Operations, of N tokens in rows of T, K = T + 1, for a decoder of Llama's shape (as many key heads as query heads):

    base       4 N L (4 d² + 3 d m) − 6 N d²         forward, and backward to the inputs; none to the frozen weights,
                                                     and none to the embeddings, below the first q, k and v
    LoRA       6 N L r (11 d + 3 m) − 6 N r d        of an (I, O) layer 6 N r (I + O): two products forward, four back
    attention  7 N K L d                             two products forward; scores again and four products back, 2 d
                                                     each a pair of tokens, of which half the square is looked at
    head       4 N' V d                              logits, and their gradient to the hidden states; N' positions learn

The first is 4·P a token (P without embeddings and head); with the last it is the 4·P that rates are quoted at.

Bytes that go through memory between the products, of bf16 values read and written one operation after another:

    blocks     2 N L (102 d + 24 m)                  norms, rotary embeddings, sums of what sites add, residuals, gated
                                                     products: forward 41 d + 11 m values, backward 61 d + 13 m
    attention  13 N K L d / 64                       scores, 13 visits to each of N K / 2 a head: 5 forward, 8 back
    head       24 N' V                               logits, 6 visits in fp32
    optimiser  60 p                                  masters, gradients, moments and inner results, 15 visits in fp32

    seconds = operations / R + bytes / W + L h

R is the machine's best product, W the rate of its best sum of two bf16 tensors, and h what the calls of a block cost (a
block's share of the step of a decoder with next to no numbers). All three are measured beside the steps and not fitted
to them. Without W and h a slope is that of operations alone, which the rate does not change.

Bytes above those of the process before its first step, where p = r L (11 d + 3 m) is what is trained:

    always     8 p                                   AdamW's two moments, in fp32
    kept       N L (12 d + 4 m + 14 r + d / 32)      a token of a block in bf16: x and x after attention (norms are made
                                                     again), q, k, v, attention's output, gate and up (their product is
                                                     made again), seven r; and a number a head
    head       V max(8 C, 4 C + 6 C') + 6 N d        a chunk of C positions: logits in bf16, probabilities in fp32 and
                                                     bf16 (the last chunk's are still there when the next one's, of C'
                                                     positions, are made); C V is at most 24 MiB / 4. Hidden states,
                                                     picked, gradient
    block      N (2 d + 8 m)                         the last MLP's backward: dy, the product made again and its
                                                     gradient, those of gate and up
    optimiser  8 p                                   gradients, and as much again inside AdamW

    peak = always + max( kept + the larger of head and block,  4 p + …, optimiser )

The middle of the maximum is the end of backward: all gradients (4 p), and activations of the first block that are still
there. Where the machine's products are taken in fp32 (`trimtab.kernels.products`), the head needs w(V d, C, 2 d) more,
of a weight of some values and a product of some rows and columns, logits are the probabilities, 4 V (C + C'), and
w(d m, N, 3 m) is always held, for a weight, x, y and dy:

    w(values, rows, columns) = 4 min(values, 2²²) + 4 min(rows, 2048) columns

Weights are bytes of the process before its first step; they are a line of their own:

    model      2 (L (4 d² + 3 d m + 2 d) + 2 V d + d) + 4 p

Legend: L layers, d width, m = 11 d / 4 width of the MLP, r rank, V vocabulary, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.kernels.products import BLOCK, ROWS, fp32_is_faster
from trimtab.losses.cross_entropy import CHUNK_BYTES

HEAD = 64
"""Width of an attention head."""


@dataclass(frozen=True)
class Sizes:
    """Of a decoder, and of a step's batch; ``width`` is a multiple of 64."""

    layers: int = 2
    width: int = 512
    rank: int = 16
    vocabulary: int = 2048
    tokens: int = 256
    rows: int = 2

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return self.width * 11 // 4

    @property
    def seen(self) -> int:
        """Tokens of a step."""
        return self.rows * self.tokens

    @property
    def learnt(self) -> int:
        """Positions of a step that have a token to learn."""
        return self.rows * (self.tokens - 1)

    @property
    def trained(self) -> int:
        """Parameters of the adapter."""
        return self.rank * self.layers * (11 * self.width + 3 * self.inner)

    @property
    def weights(self) -> int:
        """Parameters of the base."""
        d, m = self.width, self.inner
        return self.layers * (4 * d * d + 3 * d * m + 2 * d) + 2 * self.vocabulary * d + d


def operations(sizes: Sizes) -> dict[str, float]:
    """Floating-point operations of a step, by what they are for."""
    n, layers, d, m, r = sizes.seen, sizes.layers, sizes.width, sizes.inner, sizes.rank
    return {
        "base": 4 * n * layers * (4 * d * d + 3 * d * m) - 6 * n * d * d,
        "LoRA": 6 * n * layers * r * (11 * d + 3 * m) - 6 * n * r * d,
        "attention": 7 * n * (sizes.tokens + 1) * layers * d,
        "head": 4 * sizes.learnt * sizes.vocabulary * d,
    }


def traffic(sizes: Sizes) -> dict[str, float]:
    """Bytes that a step moves between its products, by what they are for."""
    n, layers, d, m = sizes.seen, sizes.layers, sizes.width, sizes.inner
    return {
        "blocks": 2 * n * layers * (102 * d + 24 * m),
        "attention": 13 * n * (sizes.tokens + 1) * layers * d / HEAD,
        "head": 24 * sizes.learnt * sizes.vocabulary,
        "optimiser": 60 * sizes.trained,
    }


@dataclass(frozen=True)
class Rates:
    """Of a machine: operations and bytes a second, and seconds that the calls of a block take."""

    operations: float
    bytes: float
    calls: float


def seconds(sizes: Sizes, rates: Rates) -> float:
    """Of a step, on a machine with these rates."""
    done = sum(operations(sizes).values()) / rates.operations
    moved = sum(traffic(sizes).values()) / rates.bytes
    return done + moved + sizes.layers * rates.calls


def step_bytes(sizes: Sizes, *, widened: bool | None = None) -> float:
    """Bytes of a step at its heaviest moment, above those of the process before its first step.

    ``widened``: products are taken in fp32; None is what this machine does.
    """
    widened = fp32_is_faster() if widened is None else widened
    n, layers, d, m, p = sizes.seen, sizes.layers, sizes.width, sizes.inner, sizes.trained
    kept = n * (12 * d + 4 * m + 14 * sizes.rank + d / 32)
    chunk = min(sizes.learnt, CHUNK_BYTES // (4 * sizes.vocabulary))
    following = min(chunk, sizes.learnt - chunk)
    head = sizes.vocabulary * max(8 * chunk, 4 * chunk + 6 * following) + 6 * n * d
    block = n * (2 * d + 8 * m)
    if widened:
        head = 4 * sizes.vocabulary * (chunk + following) + 6 * n * d
        head += _widened(sizes.vocabulary * d, chunk, 2 * d)
    top = layers * kept + max(head, block)
    end = 4 * p + kept + block
    always = 8 * p + (_widened(d * m, n, 3 * m) if widened else 0)
    return always + max(top, end, 8 * p)


def _widened(values: int, rows: int, columns: int) -> int:
    return 4 * min(values, BLOCK) + 4 * min(rows, ROWS) * columns


def model_bytes(sizes: Sizes) -> float:
    """Bytes of the base in bf16 and of the adapter in fp32."""
    return 2 * sizes.weights + 4 * sizes.trained
