"""Four-bit weights: the tables, bit-equality with bitsandbytes where it is installed, and bounds that hold anywhere."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata

import pytest
import torch

from trimtab.errors import ConfigError
from trimtab.kernels import bnb
from trimtab.kernels.fourbit import (
    TABLES,
    block_scales,
    dequantise,
    dynamic_table,
    quantise,
    unpacked,
)

SHAPES = [(512, 384), (33, 70), (7, 9), (64, 96), (2, 160), (1, 1), (64, 1)]
KINDS = ("nf4", "fp4")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_becomes_the_nearest_of_its_block(kind: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = quantise(weight, kind, nested=False)  # type: ignore[arg-type]
    scales = block_scales(packed)
    each = scales.repeat_interleave(64)[: weight.numel()]
    table = torch.tensor(TABLES[kind])
    distance = (weight.flatten()[:, None] / each[:, None] - table).abs()
    chosen = dequantise(packed).flatten() / each
    own = (weight.flatten() / each - chosen).abs()
    assert torch.allclose(own, distance.min(1).values, atol=1e-6)
    again = quantise(dequantise(packed), kind, nested=False)  # type: ignore[arg-type]
    assert torch.equal(dequantise(again), dequantise(packed))


def test_a_weight_takes_little_more_than_four_bits() -> None:
    weight = torch.randn(1024, 1024)
    assert 8 * quantise(weight).nbytes / weight.numel() <= 4.13
    assert 8 * quantise(weight, nested=False).nbytes / weight.numel() == 4.5


@pytest.mark.parametrize("version", [None, "0.48.2", "0.0rc1"])
def test_without_bitsandbytes_plain_torch_computes_the_same_and_it_is_said_once(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    packed = quantise(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(bnb.metadata, "version", found)
    bnb._found.cache_clear()
    says = "is not installed" if version is None else f"{version} is too old \\(from 0.49 on\\)"
    with pytest.warns(UserWarning, match=f"bitsandbytes {says}: .* plain torch") as told:
        values = [dequantise(packed) for _ in range(3)]
    assert len(told) == 1
    assert all(torch.equal(v, unpacked(packed, block_scales(packed), v.dtype)) for v in values)
    bnb._found.cache_clear()


def test_a_bitsandbytes_that_does_not_import_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = quantise(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(bnb.metadata, "version", lambda name: "0.50.2")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    bnb._found.cache_clear()
    with pytest.warns(UserWarning, match="bitsandbytes cannot be imported .*: .* plain torch"):
        values = dequantise(packed)
    assert torch.equal(values, unpacked(packed, block_scales(packed), values.dtype))
    bnb._found.cache_clear()


@pytest.mark.parametrize("block", [0, -64, 7, 1, 1 << 20])
def test_blocks_that_do_not_divide_are_refused(block: int) -> None:
    with pytest.raises(ConfigError, match=f"blocks of {block} values.*even number"):
        quantise(torch.randn(8, 8), block=block)


def test_tables_that_there_are_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="no table of four bits called 'nf3'"):
        quantise(torch.randn(8, 8), "nf3")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5, 13), (64, 96), (3, 64), (1, 2)])
@pytest.mark.parametrize("block", [2, 32, 64, 4096])
def test_a_last_block_may_be_short(shape: tuple[int, int], block: int) -> None:
    packed = quantise(torch.randn(shape), block=block)
    assert packed.whole
    assert dequantise(packed).shape == shape
    assert not replace(packed, codes=packed.codes[:-1]).whole
    assert not replace(packed, scales=packed.scales[:-1]).whole
    assert not replace(packed, block=block * 2 + 1).whole


def test_zeros_stay_zeros() -> None:
    weight = torch.zeros(64, 64)
    weight[1, :64] = torch.linspace(-1, 1, 64)
    back = dequantise(quantise(weight, nested=False))
    assert not back[2:].any()
    assert torch.equal(back == 0, dequantise(quantise(weight, nested=False), torch.bfloat16) == 0)


def test_the_table_of_scales_is_sorted_and_has_its_ends() -> None:
    table = dynamic_table(torch.device("cpu"))
    assert len(table) == 256
    assert torch.equal(table.sort().values, table)
    assert table[-1] == 1
    assert table[127] == 0
    assert table[0] == pytest.approx(-0.9929688)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[:5])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_bitsandbytes(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Codes and scales bit for bit. Its CPU kernel finds the 8-bit codes of scales by a shortcut that is off by one
    for two in a thousand, so these are compared with its own reference."""
    functional = pytest.importorskip("bitsandbytes.functional")
    reference = pytest.importorskip("bitsandbytes.backends.default.ops")
    assert reference is not None
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.05
    codes, state = functional.quantize_4bit(weight, compress_statistics=False, quant_type=kind)
    packed = quantise(weight, kind, nested=False)  # type: ignore[arg-type]
    assert torch.equal(codes.flatten(), packed.codes)
    assert torch.equal(state.absmax, packed.scales)
    ours = unpacked(packed, block_scales(packed), dtype)
    assert torch.equal(ours, dequantise(packed, dtype))
    if (
        shape[1] % 32 or shape[1] % 64 == 0
    ):  # at (64, 96) its CPU kernel takes the scales of other blocks
        assert torch.equal(functional.dequantize_4bit(codes, state), ours)
    assert torch.equal(functional.create_dynamic_map(), dynamic_table(torch.device("cpu")))
    nested = quantise(weight, kind)  # type: ignore[arg-type]
    _, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type=kind)
    assert torch.equal(state.state2.absmax, nested.outer)
    assert state.offset == nested.mean
    apart = (state.absmax.int() - nested.scales.int()).abs()
    if (
        len(apart) > 1
    ):  # of a single scale nothing is left once the mean is off, and any code means zero
        assert int(apart.max()) <= 1
        assert float((apart > 0).float().mean()) < 0.01
