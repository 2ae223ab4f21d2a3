"""The fused kernels against what they mean in torch; on a CPU through Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from tiue_cli.model.fast.ops import Ops, TorchOps, TritonOps

pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for CUDA)")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; on a CPU set TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

HALF = (torch.float16, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = (mean + torch.randn(*shape, generator=generator)).to(DEVICE, dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def ops() -> Ops:
    return TritonOps()


# Channels of the inputs, channels of the skip, groups, (h, w): one block a group, several, straddling, no power of two.
SHAPES = [
    (40, 0, 4, (5, 7)),
    (30, 18, 4, (6, 6)),
    (64, 0, 16, (36, 33)),
    (24, 8, 2, (40, 36)),
    (12, 0, 3, (64, 65)),
]


@pytest.mark.parametrize(
    ("own", "more", "groups", "size", "dtype"),
    [(*shape, torch.float32) for shape in SHAPES] + [(*shape, half) for shape in SHAPES[1:4:2] for half in HALF],
)
def test_group_norm_with_skip_shift_and_activation(
    ops: Ops, own: int, more: int, groups: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    repeats, rows = (2, 4) if more else (1, 2)
    inputs = draw(rows, own, *size, dtype=dtype, mean=0.5)
    skip = draw(rows // repeats, more, *size, dtype=dtype) if more else None
    weight, bias = draw(own + more, dtype=dtype, mean=1.0), draw(own + more, dtype=dtype)
    shift = draw(2, own + more, dtype=dtype)
    for moved, silu in ((None, False), (shift, True)):
        for _ in (0,):
            options = {"groups": groups, "eps": 1e-5, "silu": silu, "repeats": repeats}
            actual = ops.group_norm(inputs, weight, bias, skip=skip, shift=moved, **options)
            wide = [None if value is None else value.double() for value in (inputs, weight, bias, skip, moved)]
            expected = TorchOps().group_norm(*wide[:3], skip=wide[3], shift=wide[4], **options)
            assert actual.is_contiguous(memory_format=torch.channels_last) and actual.dtype == dtype
            assert error(actual, expected) <= TOLERANCE[dtype], (moved is None, silu)


@pytest.mark.parametrize("size", [(8, 8), (50, 44)])
def test_group_norm_over_a_slice_of_channels(ops: Ops, size: tuple[int, int]) -> None:
    whole = draw(2, 96, *size)
    weight, bias = draw(64, mean=1.0), draw(64)
    options = {"groups": 8, "eps": 1e-5, "silu": True}
    actual = ops.group_norm(whole[:, 32:], weight, bias, **options)
    assert error(actual, TorchOps().group_norm(whole[:, 32:], weight, bias, **options)) <= 2e-6


def test_group_norm_far_from_zero_keeps_its_variance(ops: Ops) -> None:
    inputs = draw(1, 16, 64, 64, mean=3000.0)
    weight, bias = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    options = {"groups": 2, "eps": 1e-6, "silu": False}
    expected = TorchOps().group_norm(inputs.double(), weight.double(), bias.double(), **options)
    assert error(ops.group_norm(inputs, weight, bias, **options), expected) <= 1e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sums_and_doubling(ops: Ops, dtype: torch.dtype) -> None:
    bias = draw(24, dtype=dtype)
    for repeats in (1, 3):
        total, addend = draw(6, 24, 9, 11, dtype=dtype), draw(6 // repeats, 24, 9, 11, dtype=dtype, mean=1.0)
        for each in (None, bias):
            expected = TorchOps().add_rows(
                total.double(), addend.double(), None if each is None else each.double(), repeats=repeats
            )
            assert error(ops.add_rows(total.clone(), addend, each, repeats=repeats), expected) <= TOLERANCE[dtype]
    assert (
        error(ops.add_rows(total.clone(), None, bias), total.double() + bias.double()[:, None, None])
        <= (TOLERANCE[dtype])
    )
    doubled = ops.double(total)
    assert torch.equal(doubled, TorchOps().double(total))
    assert doubled.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [24, 1280])
def test_tokens(ops: Ops, width: int, dtype: torch.dtype) -> None:
    projected = draw(3, 7, 2 * width, dtype=dtype)
    assert error(ops.geglu(projected), TorchOps().geglu(projected.double())) <= TOLERANCE[dtype]
    tokens, addend = draw(3, 7, width, dtype=dtype, mean=2.0), draw(3, 7, width, dtype=dtype)
    weight, bias = draw(width, dtype=dtype, mean=1.0), draw(width, dtype=dtype)
    for more in (None, addend):
        total, normed = ops.add_layer_norm(tokens, more, weight, bias, eps=1e-5)
        summed = tokens if more is None else tokens + more
        assert error(total, summed) <= TOLERANCE[dtype]
        expected = torch.nn.functional.layer_norm(summed.double(), (width,), weight.double(), bias.double(), 1e-5)
        assert error(normed, expected) <= TOLERANCE[dtype]
