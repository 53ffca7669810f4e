"""Triton source of GroupNorm with scale, shift and SiLU; imported on CUDA only.

Groups that fit into a program's registers are read once, here; larger ones go through `group_norm_chunks_triton.py`.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

from .compilation import Configuration
from .group_norm_chunks_triton import (
    Layout,
    affine,
    backward_in_chunks,
    before_activation,
    configuration,
    forward_in_chunks,
    recall,
    save,
)

FORWARD_LIMIT, BACKWARD_LIMIT = 32768, 16384
"""Numbers, padded to powers of 2, that a program holds in its registers; backward holds two tensors' and sums.

Where channels are last, forward has the lower limit too: a thread's numbers are of several channels.
"""


def launch(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    """Result for a tensor that has elements; differentiable once, in every tensor."""
    result: Tensor = GroupNormSilu.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, scale, shift, groups, epsilon, activation, torch.is_grad_enabled()
    )
    return result


class GroupNormSilu(torch.autograd.Function):
    """One kernel each way, or three for larger groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: int,
        epsilon: float,
        activation: bool,
        saving: bool,
    ) -> Tensor:
        """The result in the layout of `x`, which is saved with the coefficients."""
        channels_last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
        layout = Layout(len(x), x.shape[1], x.shape[2:].numel(), groups, channels_last)
        x = _arrange(x, channels_last)
        result = torch.empty_like(x)
        parameters = (*_parameters(weight, bias, scale, shift), epsilon)
        constants = held(layout, FORWARD_LIMIT)
        # Triton launches on the current device, wherever the pointers lead.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            if constants:
                coefficients = x.new_empty(len(x), 4, x.shape[1], dtype=torch.float32) if saving else None
                _run(group_forward, (x, result, coefficients, *parameters), layout, activation, constants)
            else:
                coefficients = forward_in_chunks(x, result, parameters, layout, activation)
        ctx.save_for_backward(x, coefficients, weight, bias, scale)
        ctx.layout, ctx.activation = layout, activation
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The input's gradient, and on the way sums over positions, which make the parameters' gradients."""
        x, coefficients, weight, bias, scale = ctx.saved_tensors
        layout, activation = ctx.layout, ctx.activation
        gradient, x_gradient = _arrange(gradient, layout.channels_last), torch.empty_like(x)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            if constants := held(layout, BACKWARD_LIMIT):
                sums = coefficients.new_empty(len(x), 2, x.shape[1])
                _run(group_backward, (x, gradient, x_gradient, coefficients, sums), layout, activation, constants)
            else:
                sums = backward_in_chunks(x, gradient, x_gradient, coefficients, layout, activation)
        _, weighs, biases, scales, shifts, *_ = ctx.needs_input_grad
        plain, normed = sums.unbind(1)
        factor = 1 if scale is None else 1 + scale.float()
        return (
            x_gradient,
            (normed * factor).sum(0) if weighs else None,
            (plain * factor).sum(0) if biases else None,
            normed * (1 if weight is None else weight) + plain * (0 if bias is None else bias) if scales else None,
            plain if shifts else None,
            *(None,) * 4,
        )


def _arrange(x: Tensor, channels_last: bool) -> Tensor:
    """The same without gaps, in one of the two layouts."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _parameters(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Weight, bias, scale and shift, and the strides of samples of the last two: half of a wider tensor stays there."""
    dense = [value if value is None or value.stride(-1) == 1 else value.contiguous() for value in tensors]
    return *dense, *(0 if value is None else value.stride(0) for value in dense[2:])


def held(layout: Layout, limit: int) -> dict[str, int] | None:
    """Constants of a program that holds whole groups, padded to powers of 2; None where they exceed the limit.

    Small groups make 1,024 numbers together, and where channels are last 32 channels: 64 bytes in half precision.
    """
    channels, positions = (triton.next_power_of_2(size) for size in (layout.group_channels, layout.positions))
    wanted = max(1, 1024 // (channels * positions), 32 // channels if layout.channels_last else 1)
    groups = min(wanted, triton.next_power_of_2(layout.groups))
    if layout.group_channels % 4 if layout.channels_last else layout.positions % 16:
        limit //= 4  # threads that read number by number need more registers for addresses and coefficients
    elif layout.channels_last:
        limit = min(limit, BACKWARD_LIMIT)
    if positions * groups * channels > limit:
        return None
    tile = {"POSITIONS": positions, "GROUPS": groups, "CHANNELS": channels}
    return tile | {"CHANNELS_LAST": layout.channels_last, "GROUP_CHANNELS": layout.group_channels}


def warps_of(constants: dict[str, int]) -> int:
    """Of 512 numbers each, and 4 at least: a thread of 32 warps has 64 registers, which hold 32 numbers of a group."""
    return min(32, max(4, constants["POSITIONS"] * constants["GROUPS"] * constants["CHANNELS"] // 512))


def _run(kernel: Any, arguments: tuple[Any, ...], layout: Layout, activation: bool, constants: dict[str, int]) -> None:
    programs = layout.samples * triton.cdiv(layout.groups, constants["GROUPS"])
    sizes = (layout.groups, layout.positions)
    kernel[(programs,)](*arguments, *sizes, ACTIVATION=activation, **constants, num_warps=warps_of(constants))


@triton.jit  # type: ignore[untyped-decorator]
def group_forward(  # type: ignore[no-untyped-def]
    x_pointer,
    result_pointer,
    coefficients_pointer,
    weight_pointer,
    bias_pointer,
    scale_pointer,
    shift_pointer,
    scale_stride,
    shift_stride,
    epsilon,
    groups,
    positions,
    CHANNELS_LAST: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POSITIONS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Whole groups: the variance is the mean of squared differences from the mean, so nothing cancels."""
    sample, channel, known, place, mask = hold(
        groups, positions, CHANNELS_LAST, GROUP_CHANNELS, POSITIONS, GROUPS, CHANNELS
    )
    channels = groups * GROUP_CHANNELS
    x = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
    size = GROUP_CHANNELS * positions
    mean = tl.sum(tl.sum(x, axis=0), axis=1) / size
    centred = tl.where(mask, x - mean[None, :, None], 0.0)
    inverse = tl.rsqrt(tl.sum(tl.sum(centred * centred, axis=0), axis=1) / size + epsilon)
    gain, offset = affine(
        weight_pointer, bias_pointer, scale_pointer, shift_pointer, scale_stride, shift_stride, sample, channel, known
    )
    if coefficients_pointer is not None:
        save(coefficients_pointer, sample, channels, channel, known, mean[:, None], inverse[:, None], gain, offset)
    result = centred * (inverse[:, None] * gain)[None, :, :] + offset[None, :, :]
    if ACTIVATION:
        result *= tl.sigmoid(result)
    tl.store(result_pointer + place, result, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def group_backward(  # type: ignore[no-untyped-def]
    x_pointer,
    gradient_pointer,
    x_gradient_pointer,
    coefficients_pointer,
    sums_pointer,
    groups,
    positions,
    CHANNELS_LAST: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POSITIONS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Whole groups: their sums, and the input's gradient."""
    sample, channel, known, place, mask = hold(
        groups, positions, CHANNELS_LAST, GROUP_CHANNELS, POSITIONS, GROUPS, CHANNELS
    )
    channels = groups * GROUP_CHANNELS
    mean, inverse, gain, offset = recall(coefficients_pointer, sample, channels, channel, known)
    x = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_pointer + place, mask=mask, other=0.0).to(tl.float32)
    normed = (x - mean[None, :, :]) * inverse[None, :, :]
    gradient = before_activation(gradient, normed * gain[None, :, :] + offset[None, :, :], ACTIVATION)
    plain_sum, normed_sum = tl.sum(gradient, axis=0), tl.sum(gradient * normed, axis=0)
    sums = sums_pointer + 2 * sample * channels + channel
    tl.store(sums, plain_sum, mask=known)
    tl.store(sums + channels, normed_sum, mask=known)
    size = GROUP_CHANNELS * positions
    plain_mean = tl.sum(plain_sum * gain, axis=1) / size
    normed_mean = tl.sum(normed_sum * gain, axis=1) / size
    x_gradient = gradient * gain[None, :, :] - plain_mean[None, :, None] - normed * normed_mean[None, :, None]
    tl.store(x_gradient_pointer + place, x_gradient * inverse[None, :, :], mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def hold(  # type: ignore[no-untyped-def]
    groups,
    positions,
    CHANNELS_LAST: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program's sample and channels, [groups, channels], with their mask; offsets and mask of all its numbers."""
    channels = groups * GROUP_CHANNELS  # a stride of which the compiler knows a divisor
    across = tl.cdiv(groups, GROUPS)
    sample = (tl.program_id(0) // across).to(tl.int64)
    group = (tl.program_id(0) % across * GROUPS + tl.arange(0, GROUPS))[:, None]
    inner = tl.arange(0, CHANNELS)[None, :]
    channel, known = group * GROUP_CHANNELS + inner, (group < groups) & (inner < GROUP_CHANNELS)
    position = tl.arange(0, POSITIONS)[:, None, None]
    if CHANNELS_LAST:
        place = (sample * positions + position) * channels + channel[None, :, :]
    else:
        place = (sample * channels + channel)[None, :, :] * positions + position
    return sample, channel, known, place, known[None, :, :] & (position < positions)


def configurations(dtype: str) -> list[Configuration]:
    """The largest groups that are held, of sizes as networks have them and of odd ones; `fp32`, `fp16` or `bf16`."""
    found = []
    for kernel, limit in ((group_forward, FORWARD_LIMIT), (group_backward, BACKWARD_LIMIT)):
        for channels_last in (False, True):
            size = BACKWARD_LIMIT if channels_last else limit
            usual = Layout(1, 640, size // 32, 32, channels_last)
            odd = Layout(1, 672, limit // 128 - 1, 32, channels_last)
            for name, layout in (("", usual), ("odd", odd)):
                constants = held(layout, limit)
                assert constants
                warps = warps_of(constants)
                # A constant stands for what a launch sees: that 16 divides the number.
                known = {"positions": layout.positions} if layout.positions % 16 == 0 else {}
                found.append(configuration(kernel, dtype, constants | known | {"ACTIVATION": True}, warps, name))
    return found
