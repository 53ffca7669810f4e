"""Triton source of GroupNorm with SiLU for groups larger than a program's registers; imported on CUDA only.

A tensor is read twice, by as many programs as fill a GPU at batch 1: first for sums over chunks of a channel's
positions, which are merged, then for the result. Both directions know four coefficients of each sample and channel: its
group's mean and 1 / standard deviation, and the gain and offset that make `norm * gain + offset`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from .compilation import Configuration

BLOCK = 2048
"""Numbers that a program takes at a time: 16 a thread, which are two loads of 16 bytes in half precision."""
PROGRAMS = 1024
"""About as many as an H100's 132 multiprocessors run at once; a large tensor takes between half and all of them."""
MERGED = 1024
"""Chunks' sums that are merged at a time."""


@dataclass(frozen=True)
class Layout:
    """A tensor as samples of channels of positions, whichever of the two is last in memory."""

    samples: int
    channels: int
    positions: int
    groups: int
    channels_last: bool

    @property
    def group_channels(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups

    def chunks(self) -> tuple[int, int, int, int]:
        """Chunks of a channel's positions, blocks of a chunk, and positions and channels of a block."""
        if self.channels_last:
            positions = BLOCK // min(triton.next_power_of_2(self.channels), 64)  # channels: 128 bytes in half precision
        else:
            positions = min(triton.next_power_of_2(self.positions), BLOCK)
        channels, blocks = BLOCK // positions, triton.cdiv(self.positions, positions)
        wanted = max(1, PROGRAMS // (self.samples * triton.cdiv(self.channels, channels)))
        chunk = triton.cdiv(blocks, wanted)
        return triton.cdiv(blocks, chunk), chunk, positions, channels

    def chunk_programs(self) -> tuple[int]:
        """The grid of one program for each chunk of each block of channels."""
        chunks, _, _, channels = self.chunks()
        return (self.samples * triton.cdiv(self.channels, channels) * chunks,)


def forward_in_chunks(
    x: Tensor, result: Tensor, parameters: tuple[Any, ...], layout: Layout, activation: bool
) -> Tensor:
    """Write the result; return the coefficients, (B, 4, C)."""
    chunks, *block = layout.chunks()
    sizes = (layout.channels, layout.positions)
    coefficients = x.new_empty(layout.samples, 4, layout.channels, dtype=torch.float32)
    partial = coefficients.new_empty(layout.samples, 2, layout.channels, chunks)
    chunk_statistics[layout.chunk_programs()](x, partial, *sizes, block[0], layout.channels_last, *block[1:])
    merge = merge_statistics[(layout.samples * layout.groups,)]
    merge(partial, coefficients, *parameters, *sizes, layout.group_channels, chunks, block[0] * block[1], MERGED)
    run = normalise[layout.chunk_programs()]
    run(x, result, coefficients, *sizes, block[0], layout.channels_last, *block[1:], activation)
    return coefficients


def backward_in_chunks(
    x: Tensor, gradient: Tensor, x_gradient: Tensor, coefficients: Tensor, layout: Layout, activation: bool
) -> Tensor:
    """Write the input's gradient; return sums over positions, (B, 2, C), of the norm's gradient, and by the norm."""
    chunks, blocks, *block = layout.chunks()
    sizes, constants = (layout.channels, layout.positions), (layout.channels_last, *block, activation)
    partial = coefficients.new_empty(layout.samples, 2, layout.channels, chunks)
    chunk_sums[layout.chunk_programs()](x, gradient, partial, coefficients, *sizes, blocks, *constants)
    sums = partial.sum(-1)
    by_group = (sums * coefficients[:, 2:3]).view(layout.samples, 2, layout.groups, -1)
    means = by_group.sum(-1) / (layout.group_channels * layout.positions)
    run = input_gradient[layout.chunk_programs()]
    run(x, gradient, x_gradient, coefficients, means, *sizes, layout.group_channels, blocks, *constants)
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def chunk_statistics(  # type: ignore[no-untyped-def]
    x_pointer,
    partial_pointer,
    channels,
    positions,
    blocks,
    CHANNELS_LAST: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean and sum of squared differences from it: Welford's recurrence, then Chan's sum over what ran side by side."""
    sample, channel, chunk, chunks = share(tl.program_id(0), channels, positions, blocks, POSITIONS, CHANNELS)
    mean = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    squares = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    count = tl.zeros([POSITIONS], tl.float32)
    for block in range(blocks):
        position = (chunk * blocks + block) * POSITIONS + tl.arange(0, POSITIONS)
        place, mask = locate(sample, channel, position, channels, positions, CHANNELS_LAST)
        x = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
        difference = tl.where(mask, x - mean, 0.0)
        mean += difference * (1.0 / (block + 1))
        squares += difference * (x - mean)
        count += (position < positions).to(tl.float32)
    total_mean = tl.sum(mean * count[:, None], axis=0) / tl.sum(count)
    difference = mean - total_mean[None, :]
    partial = partial_pointer + (2 * sample * channels + channel) * chunks + chunk
    tl.store(partial, total_mean, mask=channel < channels)
    squares = tl.sum(squares + count[:, None] * difference * difference, axis=0)
    tl.store(partial + channels * chunks, squares, mask=channel < channels)


@triton.jit  # type: ignore[untyped-decorator]
def merge_statistics(  # type: ignore[no-untyped-def]
    partial_pointer,
    coefficients_pointer,
    weight_pointer,
    bias_pointer,
    scale_pointer,
    shift_pointer,
    scale_stride,
    shift_stride,
    epsilon,
    channels,
    positions,
    group_channels,
    chunks,
    chunk_positions,
    MERGED: tl.constexpr,
):
    """Chan's sum over a group's chunks, and the coefficients."""
    groups = channels // group_channels
    sample = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * group_channels
    means_pointer = partial_pointer + (2 * sample * channels + first) * chunks
    total = tl.zeros([MERGED], tl.float32)
    for begin in range(0, group_channels * chunks, MERGED):
        entry = begin + tl.arange(0, MERGED)
        count = tl.minimum(positions - entry % chunks * chunk_positions, chunk_positions)
        total += count * tl.load(means_pointer + entry, mask=entry < group_channels * chunks, other=0.0)
    mean = tl.sum(total) / (group_channels * positions)
    total = tl.zeros([MERGED], tl.float32)
    for begin in range(0, group_channels * chunks, MERGED):
        entry = begin + tl.arange(0, MERGED)
        mask = entry < group_channels * chunks
        count = tl.minimum(positions - entry % chunks * chunk_positions, chunk_positions)
        difference = tl.load(means_pointer + entry, mask=mask, other=0.0) - mean
        squares = tl.load(means_pointer + channels * chunks + entry, mask=mask, other=0.0)
        total += tl.where(mask, squares + count * difference * difference, 0.0)
    inverse = tl.rsqrt(tl.sum(total) / (group_channels * positions) + epsilon)
    for begin in range(0, group_channels, MERGED):
        channel = begin + tl.arange(0, MERGED)
        known = channel < group_channels
        channel += first
        gain, offset = affine(
            weight_pointer,
            bias_pointer,
            scale_pointer,
            shift_pointer,
            scale_stride,
            shift_stride,
            sample,
            channel,
            known,
        )
        save(coefficients_pointer, sample, channels, channel, known, mean, inverse, gain, offset)


@triton.jit  # type: ignore[untyped-decorator]
def normalise(  # type: ignore[no-untyped-def]
    x_pointer,
    result_pointer,
    coefficients_pointer,
    channels,
    positions,
    blocks,
    CHANNELS_LAST: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The result, from the end of each chunk to its beginning: what was read last is still in the cache."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, channel, chunk, _ = share(program, channels, positions, blocks, POSITIONS, CHANNELS)
    mean, inverse, gain, offset = recall(coefficients_pointer, sample, channels, channel, channel < channels)
    gain *= inverse
    for block in range(blocks):
        position = (chunk * blocks + blocks - 1 - block) * POSITIONS + tl.arange(0, POSITIONS)
        place, mask = locate(sample, channel, position, channels, positions, CHANNELS_LAST)
        x = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
        result = (x - mean[None, :]) * gain[None, :] + offset[None, :]
        if ACTIVATION:
            result *= tl.sigmoid(result)
        tl.store(result_pointer + place, result, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def chunk_sums(  # type: ignore[no-untyped-def]
    x_pointer,
    gradient_pointer,
    partial_pointer,
    coefficients_pointer,
    channels,
    positions,
    blocks,
    CHANNELS_LAST: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Sums of the gradient before the activation, and of its products with the norm."""
    sample, channel, chunk, chunks = share(tl.program_id(0), channels, positions, blocks, POSITIONS, CHANNELS)
    mean, inverse, gain, offset = recall(coefficients_pointer, sample, channels, channel, channel < channels)
    plain_sum = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    normed_sum = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for block in range(blocks):
        position = (chunk * blocks + block) * POSITIONS + tl.arange(0, POSITIONS)
        place, mask = locate(sample, channel, position, channels, positions, CHANNELS_LAST)
        x = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_pointer + place, mask=mask, other=0.0).to(tl.float32)
        normed = (x - mean[None, :]) * inverse[None, :]
        gradient = before_activation(gradient, normed * gain[None, :] + offset[None, :], ACTIVATION)
        plain_sum += gradient
        normed_sum += gradient * normed
    partial = partial_pointer + (2 * sample * channels + channel) * chunks + chunk
    tl.store(partial, tl.sum(plain_sum, axis=0), mask=channel < channels)
    tl.store(partial + channels * chunks, tl.sum(normed_sum, axis=0), mask=channel < channels)


@triton.jit  # type: ignore[untyped-decorator]
def input_gradient(  # type: ignore[no-untyped-def]
    x_pointer,
    gradient_pointer,
    x_gradient_pointer,
    coefficients_pointer,
    means_pointer,
    channels,
    positions,
    group_channels,
    blocks,
    CHANNELS_LAST: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The input's gradient, from the end of each chunk to its beginning: what was read last is still in the cache."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, channel, chunk, _ = share(program, channels, positions, blocks, POSITIONS, CHANNELS)
    known = channel < channels
    mean, inverse, gain, offset = recall(coefficients_pointer, sample, channels, channel, known)
    groups = channels // group_channels
    means = means_pointer + 2 * sample * groups + channel // group_channels
    plain_mean, normed_mean = tl.load(means, mask=known, other=0.0), tl.load(means + groups, mask=known, other=0.0)
    for block in range(blocks):
        position = (chunk * blocks + blocks - 1 - block) * POSITIONS + tl.arange(0, POSITIONS)
        place, mask = locate(sample, channel, position, channels, positions, CHANNELS_LAST)
        x = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_pointer + place, mask=mask, other=0.0).to(tl.float32)
        normed = (x - mean[None, :]) * inverse[None, :]
        gradient = before_activation(gradient, normed * gain[None, :] + offset[None, :], ACTIVATION)
        x_gradient = gradient * gain[None, :] - plain_mean[None, :] - normed * normed_mean[None, :]
        tl.store(x_gradient_pointer + place, x_gradient * inverse[None, :], mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def share(program, channels, positions, blocks, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's sample, in int64 as all offsets begin with it; its channels; its chunk, and how many there are."""
    chunks = tl.cdiv(positions, blocks * POSITIONS)
    across = tl.cdiv(channels, CHANNELS)
    channel = program // chunks % across * CHANNELS + tl.arange(0, CHANNELS)
    return (program // chunks // across).to(tl.int64), channel, program % chunks, chunks


@triton.jit  # type: ignore[untyped-decorator]
def locate(sample, channel, position, channels, positions, CHANNELS_LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets and mask of [positions, channels]."""
    mask = (position < positions)[:, None] & (channel < channels)[None, :]
    channel, position = channel.to(tl.int64)[None, :], position.to(tl.int64)[:, None]
    if CHANNELS_LAST:
        place = (sample * positions + position) * channels + channel
    else:
        place = (sample * channels + channel) * positions + position
    return place, mask


@triton.jit
def affine(  # type: ignore[no-untyped-def]
    weight_pointer,
    bias_pointer,
    scale_pointer,
    shift_pointer,
    scale_stride,
    shift_stride,
    sample,
    channel,
    known,
):
    """Gain and offset: the norm's weight and bias, then the sample's scale and shift."""
    gain = tl.full(channel.shape, 1.0, tl.float32)
    offset = tl.zeros(channel.shape, tl.float32)
    if weight_pointer is not None:
        gain = tl.load(weight_pointer + channel, mask=known, other=0.0).to(tl.float32)
    if bias_pointer is not None:
        offset = tl.load(bias_pointer + channel, mask=known, other=0.0).to(tl.float32)
    if scale_pointer is not None:
        scale = tl.load(scale_pointer + sample * scale_stride + channel, mask=known, other=0.0).to(tl.float32)
        gain += gain * scale
        offset += offset * scale
    if shift_pointer is not None:
        offset += tl.load(shift_pointer + sample * shift_stride + channel, mask=known, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def save(pointer, sample, channels, channel, known, mean, inverse, gain, offset):  # type: ignore[no-untyped-def]
    """Write the coefficients of a sample's channels."""
    pointer += 4 * sample * channels + channel
    tl.store(pointer, mean, mask=known)
    tl.store(pointer + channels, inverse, mask=known)
    tl.store(pointer + 2 * channels, gain, mask=known)
    tl.store(pointer + 3 * channels, offset, mask=known)


@triton.jit
def recall(pointer, sample, channels, channel, known):  # type: ignore[no-untyped-def]
    """Read them: mean, 1 / standard deviation, gain, offset."""
    pointer += 4 * sample * channels + channel
    mean = tl.load(pointer, mask=known, other=0.0)
    inverse = tl.load(pointer + channels, mask=known, other=0.0)
    gain = tl.load(pointer + 2 * channels, mask=known, other=0.0)
    return mean, inverse, gain, tl.load(pointer + 3 * channels, mask=known, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def before_activation(gradient, before, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of SiLU's argument, `before`, from that of its result."""
    if ACTIVATION:
        passed = tl.sigmoid(before)
        gradient *= passed * (1.0 + before * (1.0 - passed))
    return gradient


def configurations(dtype: str) -> list[Configuration]:
    """An autoencoder's 128 channels of 512 x 512 positions, and odd sizes; dtype is `fp32`, `fp16` or `bf16`."""
    found = [configuration(merge_statistics, dtype, {"MERGED": MERGED})]
    # Constants stand for what a launch sees: that 16 divides the numbers.
    sizes = {"channels": 128, "positions": 512 * 512}
    for channels_last in (False, True):
        *_, positions, channels = Layout(1, sizes["channels"], sizes["positions"], 32, channels_last).chunks()
        tile = {"CHANNELS_LAST": channels_last, "POSITIONS": positions, "CHANNELS": channels, "ACTIVATION": True}
        for name, known in (("", sizes), ("odd", {})):
            for kernel in (chunk_statistics, normalise, chunk_sums, input_gradient):
                constants = {key: value for key, value in (tile | known).items() if key in kernel.arg_names}
                found.append(configuration(kernel, dtype, constants, name=name))
    return found


def configuration(kernel: Any, dtype: str, constants: dict[str, Any], warps: int = 4, name: str = "") -> Configuration:
    """Of a kernel whose sums and coefficients are float32, and whose sizes and strides are 32-bit integers."""
    types = {}
    for parameter in kernel.arg_names:
        if parameter in ("partial_pointer", "coefficients_pointer", "means_pointer", "sums_pointer"):
            types[parameter] = "*fp32"
        elif parameter.endswith("_pointer"):
            types[parameter] = f"*{dtype}"
        elif parameter not in constants:
            types[parameter] = "fp32" if parameter == "epsilon" else "i32"
    layout = {False: "contiguous", True: "channels-last", None: ""}[constants.get("CHANNELS_LAST")]
    return Configuration("-".join(filter(None, (kernel.__name__, layout, name))), kernel, types, constants, warps)
