"""Fused kernels over channels-last memory in Triton; imported on CUDA only, and by tests through Triton's interpreter.

ATen's GroupNorm copies a channels-last tensor to the other format and back, and has one block a group: at batch 1 that
is half of the time of Stable Diffusion's image decoder. Here a group's pixels are shared among blocks: one kernel sums
each chunk, the next one adds the sums and normalises. All sums are float32, in a fixed order: equal inputs give equal
bytes. A group that fits into one block's registers is read once, by one kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 1024
"""About how many blocks keep every multiprocessor busy: a Hopper GPU has 132, each with room for several."""
_TILE = 4096
"""Elements that a block of four warps holds at a time."""
_WHOLE = 16384
"""A group of at most this many elements, padding included, is one block's."""
_MOST_CHUNKS = 256
_ANY = ("repeats", "shift_rows")
"""Numbers that no kernel is worth compiling anew for."""


def group_norm(
    inputs: Tensor,
    skip: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    silu: bool,
    repeats: int,
) -> Tensor:
    """See ``Ops.group_norm``; the output is dense and channels-last."""
    rows, own, height, width = inputs.shape
    channels, pixels = weight.shape[0], height * width
    assert inputs.stride(1) == 1 or own == 1, "inputs are channels-last"
    assert skip is None or skip.stride(1) == 1 or skip.shape[1] == 1, "the skip is channels-last"
    out = torch.empty(
        (rows, channels, height, width), dtype=inputs.dtype, device=inputs.device, memory_format=torch.channels_last
    )
    group = channels // groups
    padded = triton.next_power_of_2(group)
    second = inputs if skip is None else skip
    moved = weight if shift is None else shift
    common = (
        inputs, second, moved, weight, bias, out,
        pixels, own, channels,
        inputs.stride(0), inputs.stride(3), second.stride(0), second.stride(3),
        repeats, 1 if shift is None else shift.shape[0], 0 if shift is None else shift.stride(0),
        eps,
    )  # fmt: skip
    flags = {"HAS_SKIP": skip is not None, "HAS_SHIFT": shift is not None, "SILU": silu}
    whole = triton.next_power_of_2(pixels)
    if whole * padded <= _WHOLE:
        _norm_whole[(rows, groups)](
            *common, GROUP=group, PADDED=padded, PIXELS=whole, **flags, num_warps=4 if whole * padded <= 4096 else 8
        )
        return out
    together = min(max(1, 128 // padded), triton.next_power_of_2(groups))
    block = max(1, _TILE // (together * padded))
    tall = triton.cdiv(groups, together)
    blocks = triton.cdiv(pixels, block)
    chunks = min(blocks, _MOST_CHUNKS, max(1, triton.cdiv(_PROGRAMS, rows * tall)))
    # Powers of two, as each number of turns is a kernel of its own that must be compiled.
    turns = triton.next_power_of_2(triton.cdiv(blocks, chunks))
    chunks = triton.cdiv(blocks, turns)
    sums = torch.empty((rows, chunks, 2, groups), dtype=torch.float32, device=inputs.device)
    shape = {"GROUP": group, "PADDED": padded, "TOGETHER": together, "BLOCK": block, **flags}
    _norm_sums[(chunks, tall, rows)](*common, sums, groups, TURNS=turns, **shape, num_warps=4)
    turns = 1 << min(3, max(0, (blocks * rows * tall // (2 * _PROGRAMS)).bit_length() - 1))
    _norm_apply[(triton.cdiv(blocks, turns), tall, rows)](
        *common, sums, groups, chunks, CHUNKS=triton.next_power_of_2(chunks), TURNS=turns, **shape, num_warps=4
    )
    return out


def add_rows(total: Tensor, addend: Tensor | None, bias: Tensor | None, *, repeats: int) -> Tensor:
    """See ``Ops.add_rows``; adds in place."""
    rows, channels, height, width = total.shape
    for image in (total, total if addend is None else addend):
        assert image.is_contiguous(memory_format=torch.channels_last), "both are dense and channels-last"
    each = channels * height * width
    _add_rows[(triton.cdiv(each, 1024), rows)](
        total, total if addend is None else addend, total if bias is None else bias, each, channels, repeats,
        HAS_ADDEND=addend is not None, HAS_BIAS=bias is not None, BLOCK=1024,
    )  # fmt: skip
    return total


def double(hidden: Tensor) -> Tensor:
    """See ``Ops.double``."""
    rows, channels, height, width = hidden.shape
    assert hidden.is_contiguous(memory_format=torch.channels_last), "the input is dense and channels-last"
    out = torch.empty(
        (rows, channels, 2 * height, 2 * width),
        dtype=hidden.dtype,
        device=hidden.device,
        memory_format=torch.channels_last,
    )
    each = channels * width
    _double[(triton.cdiv(each, 1024), height, rows)](hidden, out, height, each, channels, BLOCK=1024)
    return out


def geglu(projected: Tensor) -> Tensor:
    """See ``Ops.geglu``."""
    width = projected.shape[-1] // 2
    out = torch.empty((*projected.shape[:-1], width), dtype=projected.dtype, device=projected.device)
    count = out.numel() // width
    _geglu[(count, triton.cdiv(width, 1024))](projected, out, width, BLOCK=min(1024, triton.next_power_of_2(width)))
    return out


def quick_gelu(values: Tensor) -> Tensor:
    """See ``Ops.quick_gelu``."""
    assert values.is_contiguous(), "values are dense"
    out = torch.empty_like(values)
    _quick_gelu[(triton.cdiv(out.numel(), 1024),)](values, out, out.numel(), BLOCK=1024)
    return out


def add_layer_norm(
    tokens: Tensor, addend: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """See ``Ops.add_layer_norm``."""
    width = tokens.shape[-1]
    count = tokens.numel() // width
    out = torch.empty_like(tokens)
    total = tokens if addend is None else torch.empty_like(tokens)
    padded = triton.next_power_of_2(width)
    block = max(1, 2048 // padded)
    _add_layer_norm[(triton.cdiv(count, block),)](
        tokens, tokens if addend is None else addend, total, out, weight, bias, count, width, eps,
        HAS_ADDEND=addend is not None, BLOCK=block, WIDTH=padded, num_warps=4,
    )  # fmt: skip
    return total, out


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _silu(value):
    return value / (1.0 + tl.exp(-value))


@triton.jit
def _shift_of(shift, row, channel, mask, shift_rows, shift_row, HAS_SHIFT: tl.constexpr):
    """The row's shift of each channel, in float32; zeros where there is none."""
    if HAS_SHIFT:
        moved = tl.load(shift + (row % shift_rows) * shift_row + channel, mask=mask, other=0.0).to(tl.float32)
    else:
        moved = tl.zeros(channel.shape, dtype=tl.float32)
    return moved


@triton.jit
def _load(
    inputs, skip, moved, row, pixel, channel, mask,
    own, in_row, in_pixel, skip_row, skip_pixel, repeats, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """Channels of ``cat([inputs, skip])`` plus ``moved`` at pixels of one row, in float32."""
    own_mask = mask & (channel < own) if HAS_SKIP else mask
    value = tl.load(inputs + row * in_row + pixel * in_pixel + channel, mask=own_mask, other=0.0).to(tl.float32)
    if HAS_SKIP:
        place = skip + (row // repeats) * skip_row + pixel * skip_pixel + (channel - own)
        value += tl.load(place, mask=mask & (channel >= own), other=0.0).to(tl.float32)
    return value + moved


@triton.jit(do_not_specialize=_ANY)
def _norm_whole(
    inputs, skip, shift, weight, bias, out,
    pixels, own, channels, in_row, in_pixel, skip_row, skip_pixel, repeats, shift_rows, shift_row, eps,
    GROUP: tl.constexpr, PADDED: tl.constexpr, PIXELS: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One group of one row: read once, normalised in registers."""
    row = tl.program_id(0).to(tl.int64)
    pixel = tl.arange(0, PIXELS)[:, None]
    member = tl.arange(0, PADDED)[None, :]
    channel = tl.program_id(1) * GROUP + member
    mask = (pixel < pixels) & (member < GROUP)
    moved = _shift_of(shift, row, channel, member < GROUP, shift_rows, shift_row, HAS_SHIFT)
    value = _load(
        inputs, skip, moved, row, pixel, channel, mask,
        own, in_row, in_pixel, skip_row, skip_pixel, repeats, HAS_SKIP,
    )  # fmt: skip
    count = pixels * GROUP
    mean = tl.sum(tl.sum(tl.where(mask, value, 0.0), axis=1), axis=0) / count
    centred = tl.where(mask, value - mean, 0.0)
    variance = tl.sum(tl.sum(centred * centred, axis=1), axis=0) / count
    scale = tl.load(weight + channel, mask=member < GROUP, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=member < GROUP, other=0.0).to(tl.float32)
    result = centred * (1.0 / tl.sqrt(variance + eps)) * scale + offset
    if SILU:
        result = _silu(result)
    tl.store(out + (row * pixels + pixel) * channels + channel, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _columns(
    GROUP: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr, groups
):  # fmt: skip
    """Channel and mask of each column of a tile: TOGETHER groups of GROUP channels, each padded to PADDED."""
    column = tl.arange(0, TOGETHER * PADDED)
    first = tl.program_id(1) * TOGETHER
    if GROUP == PADDED:
        channel = first * GROUP + column
        mask = channel < groups * GROUP
    else:
        channel = (first + column // PADDED) * GROUP + column % PADDED
        mask = (column % PADDED < GROUP) & (first + column // PADDED < groups)
    return channel, mask


@triton.jit
def _by_group(columns, TOGETHER: tl.constexpr, PADDED: tl.constexpr):
    """Sums of a tile's columns over each group, one value a column again."""
    sums = tl.sum(tl.reshape(columns, (TOGETHER, PADDED)), axis=1)
    return sums, tl.reshape(tl.broadcast_to(sums[:, None], (TOGETHER, PADDED)), (TOGETHER * PADDED,))


@triton.jit(do_not_specialize=_ANY)
def _norm_sums(
    inputs, skip, shift, weight, bias, out,
    pixels, own, channels, in_row, in_pixel, skip_row, skip_pixel, repeats, shift_rows, shift_row, eps,
    sums, groups, TURNS: tl.constexpr,
    GROUP: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sums of x - pivot and its square over a chunk of pixels; the pivot is the group's mean at the first pixel.

    Without a pivot the difference of two large sums would lose the variance of a group far from zero.
    """
    row = tl.program_id(2).to(tl.int64)
    channel, mask = _columns(GROUP, PADDED, TOGETHER, groups)
    moved = _shift_of(shift, row, channel, mask, shift_rows, shift_row, HAS_SHIFT)
    at_zero = _load(
        inputs, skip, moved, row, 0, channel, mask,
        own, in_row, in_pixel, skip_row, skip_pixel, repeats, HAS_SKIP,
    )  # fmt: skip
    _, pivot = _by_group(at_zero, TOGETHER, PADDED)
    pivot = pivot / GROUP
    total = tl.zeros((BLOCK, TOGETHER * PADDED), dtype=tl.float32)
    squares = tl.zeros((BLOCK, TOGETHER * PADDED), dtype=tl.float32)
    for turn in range(TURNS):
        pixel = (tl.program_id(0) * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)[:, None]
        inside = (pixel < pixels) & mask[None, :]
        value = _load(
            inputs, skip, moved[None, :], row, pixel, channel[None, :], inside,
            own, in_row, in_pixel, skip_row, skip_pixel, repeats, HAS_SKIP,
        )  # fmt: skip
        centred = tl.where(inside, value - pivot[None, :], 0.0)
        total += centred
        squares += centred * centred
    group_total, _ = _by_group(tl.sum(total, axis=0), TOGETHER, PADDED)
    group_squares, _ = _by_group(tl.sum(squares, axis=0), TOGETHER, PADDED)
    group = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    place = sums + ((row * tl.num_programs(0) + tl.program_id(0)) * 2) * groups + group
    tl.store(place, group_total, mask=group < groups)
    tl.store(place + groups, group_squares, mask=group < groups)


@triton.jit(do_not_specialize=_ANY)
def _norm_apply(
    inputs, skip, shift, weight, bias, out,
    pixels, own, channels, in_row, in_pixel, skip_row, skip_pixel, repeats, shift_rows, shift_row, eps,
    sums, groups, chunks, CHUNKS: tl.constexpr, TURNS: tl.constexpr,
    GROUP: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Mean and variance from the chunks' sums, then normalise, scale, and activate."""
    row = tl.program_id(2).to(tl.int64)
    channel, mask = _columns(GROUP, PADDED, TOGETHER, groups)
    moved = _shift_of(shift, row, channel, mask, shift_rows, shift_row, HAS_SHIFT)
    at_zero = _load(
        inputs, skip, moved, row, 0, channel, mask,
        own, in_row, in_pixel, skip_row, skip_pixel, repeats, HAS_SKIP,
    )  # fmt: skip
    pivot, _ = _by_group(at_zero, TOGETHER, PADDED)
    pivot = pivot / GROUP
    group = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)[None, :]
    chunk = tl.arange(0, CHUNKS)[:, None]
    place = sums + ((row * chunks + chunk) * 2) * groups + group
    there = (chunk < chunks) & (group < groups)
    count = pixels * GROUP
    mean = tl.sum(tl.load(place, mask=there, other=0.0), axis=0) / count
    variance = tl.sum(tl.load(place + groups, mask=there, other=0.0), axis=0) / count - mean * mean
    inverse = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    centre = tl.reshape(tl.broadcast_to((pivot + mean)[:, None], (TOGETHER, PADDED)), (TOGETHER * PADDED,))
    inverse = tl.reshape(tl.broadcast_to(inverse[:, None], (TOGETHER, PADDED)), (TOGETHER * PADDED,))
    scale = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32) * inverse
    offset = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    for turn in range(TURNS):
        pixel = (tl.program_id(0) * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)[:, None]
        inside = (pixel < pixels) & mask[None, :]
        value = _load(
            inputs, skip, moved[None, :], row, pixel, channel[None, :], inside,
            own, in_row, in_pixel, skip_row, skip_pixel, repeats, HAS_SKIP,
        )  # fmt: skip
        result = (value - centre[None, :]) * scale[None, :] + offset[None, :]
        if SILU:
            result = _silu(result)
        target = out + (row * pixels + pixel) * channels + channel[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_rows(
    total, addend, bias, each, channels, repeats,
    HAS_ADDEND: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total[row] += addend[row // repeats] + bias."""
    row = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < each
    value = tl.load(total + row * each + index, mask=mask).to(tl.float32)
    if HAS_ADDEND:
        value += tl.load(addend + (row // repeats) * each + index, mask=mask).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + index % channels, mask=mask).to(tl.float32)
    tl.store(total + row * each + index, value.to(total.dtype.element_ty), mask=mask)


@triton.jit
def _double(hidden, out, height, each, channels, BLOCK: tl.constexpr):
    """Every pixel of one line twice, on two lines."""
    line = tl.program_id(2).to(tl.int64) * height + tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < each
    value = tl.load(hidden + line * each + index, mask=mask)
    place = out + line * 4 * each + (index // channels) * 2 * channels + index % channels
    tl.store(place, value, mask=mask)
    tl.store(place + channels, value, mask=mask)
    tl.store(place + 2 * each, value, mask=mask)
    tl.store(place + 2 * each + channels, value, mask=mask)


@triton.jit
def _geglu(projected, out, width, BLOCK: tl.constexpr):
    """values * gelu(gates), the gates being the second half of each row; the exact GELU."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < width
    value = tl.load(projected + row * 2 * width + index, mask=mask).to(tl.float32)
    gate = tl.load(projected + (row * 2 + 1) * width + index, mask=mask).to(tl.float32)
    activated = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * width + index, (value * activated).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _quick_gelu(values, out, count, BLOCK: tl.constexpr):
    """x · sigmoid(1.702 x)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + index, mask=index < count).to(tl.float32)
    result = value / (1.0 + tl.exp(-1.702 * value))
    tl.store(out + index, result.to(out.dtype.element_ty), mask=index < count)


@triton.jit
def _add_layer_norm(
    tokens, addend, total, out, weight, bias, count, width, eps,
    HAS_ADDEND: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum of two rows of tokens, kept, and its layer norm."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    mask = (row < count) & (column < width)
    place = row * width + column
    value = tl.load(tokens + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADDEND:
        value += tl.load(addend + place, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=mask)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, axis=1)[:, None] / width
    centred = tl.where(mask, value - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / width
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    offset = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    result = centred * (1.0 / tl.sqrt(variance + eps)) * scale + offset
    tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)
