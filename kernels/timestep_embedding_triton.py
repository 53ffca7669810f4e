"""Triton source of the timestep embedding; imported on CUDA only.

A GPU spends this operation on reading the weights, so each program reads a few rows of them, once for a few samples.
"""

import math

import torch
import triton
from torch import Tensor
from triton import language as tl

from .compilation import Configuration

ROWS = 8
"""Rows of the weights a program: 160 programs for SD's 1280 features."""


def launch(
    t: Tensor,
    channels: int,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    flip_sin_to_cos: bool,
    downscale_frequency_shift: float,
    scale: float,
    max_period: int,
) -> Tensor:
    """Two launches: sinusoids, the first layer and SiLU; then the second layer. Float32 lies between them."""
    batch, half = len(t), channels // 2
    hidden = torch.empty(batch, len(weight_1), dtype=torch.float32, device=t.device)
    embedding = torch.empty(batch, len(weight_2), dtype=weight_2.dtype, device=t.device)
    if embedding.numel():
        blocks = block_sizes(batch)
        groups = triton.cdiv(batch, blocks["SAMPLES"])
        frequencies = (-math.log(max_period), half - downscale_frequency_shift, scale)
        sizes = (batch, half, channels, hidden.shape[1])
        # Triton launches on the current device, wherever the pointers lead.
        with torch.cuda.device_of(t):  # type: ignore[no-untyped-call]
            first_layer[(triton.cdiv(hidden.shape[1], ROWS), groups)](
                t.contiguous(),
                weight_1.contiguous(),
                bias_1.contiguous(),
                hidden,
                *map(float, frequencies),
                *sizes,
                FLIPS=flip_sin_to_cos,
                **blocks,
            )
            second_layer[(triton.cdiv(embedding.shape[1], ROWS), groups)](
                hidden, weight_2.contiguous(), bias_2.contiguous(), embedding, batch, *weight_2.shape[::-1], **blocks
            )
    return embedding


def block_sizes(batch: int) -> dict[str, int]:
    """What a program holds: long rows for one sample, shorter ones for four, so that products stay in registers."""
    return {"SAMPLES": 1, "ROWS": ROWS, "BLOCK": 512} if batch == 1 else {"SAMPLES": 4, "ROWS": ROWS, "BLOCK": 256}


@triton.jit(do_not_specialize=["batch"])  # type: ignore[untyped-decorator]
def first_layer(  # type: ignore[no-untyped-def]
    t_pointer,
    weight_pointer,
    bias_pointer,
    hidden_pointer,
    minus_log_period,
    frequency_steps,
    scale,
    batch,
    half,
    channels,
    features,
    FLIPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SiLU of the first layer, of `ROWS` features and `SAMPLES` samples. Each angle is used for its sine and cosine."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1) * SAMPLES + tl.arange(0, SAMPLES)
    t = tl.load(t_pointer + sample, mask=sample < batch, other=0).to(tl.float32)
    products = tl.zeros([SAMPLES, ROWS, BLOCK], tl.float32)
    for start in range(0, half, BLOCK):
        column = start + tl.arange(0, BLOCK)
        # Times reach 1000, which magnifies a frequency's error: the exponential is not the approximate one of float32.
        exponent = tl.div_rn(minus_log_period * column.to(tl.float32), frequency_steps)
        frequency = tl.exp(exponent.to(tl.float64)).to(tl.float32)
        angle = scale * (t[:, None] * frequency[None, :])
        place = row[:, None].to(tl.int64) * channels + column[None, :]
        mask = (row[:, None] < features) & (column[None, :] < half)
        first = tl.load(weight_pointer + place, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(weight_pointer + place + half, mask=mask, other=0.0).to(tl.float32)
        of_cosine, of_sine = (first, second) if FLIPS else (second, first)
        products += tl.cos(angle)[:, None, :] * of_cosine[None, :, :] + tl.sin(angle)[:, None, :] * of_sine[None, :, :]
    bias = tl.load(bias_pointer + row, mask=row < features, other=0.0).to(tl.float32)
    total = tl.sum(products, axis=2) + bias[None, :]
    place = sample[:, None].to(tl.int64) * features + row[None, :]
    mask = (sample[:, None] < batch) & (row[None, :] < features)
    tl.store(hidden_pointer + place, total * tl.sigmoid(total), mask=mask)


@triton.jit(do_not_specialize=["batch"])  # type: ignore[untyped-decorator]
def second_layer(  # type: ignore[no-untyped-def]
    hidden_pointer,
    weight_pointer,
    bias_pointer,
    embedding_pointer,
    batch,
    inputs,
    features,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second layer, of `ROWS` features and `SAMPLES` samples."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1) * SAMPLES + tl.arange(0, SAMPLES)
    products = tl.zeros([SAMPLES, ROWS, BLOCK], tl.float32)
    for start in range(0, inputs, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = sample[:, None].to(tl.int64) * inputs + column[None, :]
        mask = (sample[:, None] < batch) & (column[None, :] < inputs)
        hidden = tl.load(hidden_pointer + place, mask=mask, other=0.0)
        place = row[:, None].to(tl.int64) * inputs + column[None, :]
        mask = (row[:, None] < features) & (column[None, :] < inputs)
        weight = tl.load(weight_pointer + place, mask=mask, other=0.0).to(tl.float32)
        products += hidden[:, None, :] * weight[None, :, :]
    bias = tl.load(bias_pointer + row, mask=row < features, other=0.0).to(tl.float32)
    total = tl.sum(products, axis=2) + bias[None, :]
    place = sample[:, None].to(tl.int64) * features + row[None, :]
    mask = (sample[:, None] < batch) & (row[None, :] < features)
    tl.store(embedding_pointer + place, total.to(embedding_pointer.dtype.element_ty), mask=mask)


def configurations(dtype: str) -> list[Configuration]:
    """How `launch` compiles the two kernels for layers of a dtype and float32 times, one sample or more."""
    layer = dict.fromkeys(("weight_pointer", "bias_pointer"), f"*{dtype}")
    first = {
        **layer,
        **dict.fromkeys(("t_pointer", "hidden_pointer"), "*fp32"),
        **dict.fromkeys(("minus_log_period", "frequency_steps", "scale"), "fp32"),
        **dict.fromkeys(("batch", "half", "channels", "features"), "i32"),
    }
    second = {
        **layer,
        "hidden_pointer": "*fp32",
        "embedding_pointer": f"*{dtype}",
        **dict.fromkeys(("batch", "inputs", "features"), "i32"),
    }
    return [
        configuration
        for batch in (1, 4)
        for configuration in (
            Configuration(f"first-{batch}", first_layer, first, {"FLIPS": True, **block_sizes(batch)}),
            Configuration(f"second-{batch}", second_layer, second, block_sizes(batch)),
        )
    ]
