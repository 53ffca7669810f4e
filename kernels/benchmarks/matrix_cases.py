"""Operations whose time is that of their matrix products, and the small embedding that feeds all modulations."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..attention import attention, attention_reference, attention_with_tangent, attention_with_tangent_reference
from ..quantised_linear import (
    Kind,
    QuantisedWeight,
    quantise_weight,
    quantised_linear,
    quantised_linear_reference,
)
from ..timestep_embedding import timestep_embedding, timestep_embedding_reference
from .measure import Case, Settings, Variant
from .shapes import Shapes


def attention_cases(shapes: Shapes) -> Iterator[Case]:
    """Self-attention, beside torch's own fused attention."""
    for name, where, size in _attention_sizes(shapes):
        yield Case(
            "attention",
            name,
            where,
            attention,
            attention_reference,
            partial(_operands, 3, size),
            trained=(0, 1, 2),
            rivals={"sdpa": _sdpa},
            work=_work(size),
        )


def tangent_cases(shapes: Shapes) -> Iterator[Case]:
    """Attention with its tangent, three times the products, beside torch's fused attention without one."""
    for name, where, size in _attention_sizes(shapes):
        yield Case(
            "attention_with_tangent",
            name,
            where,
            attention_with_tangent,
            attention_with_tangent_reference,
            partial(_operands, 6, size),
            rivals={"sdpa without tangent": lambda *inputs: replace(_sdpa(*inputs), share=1 / 3)},
            work=3 * _work(size),
        )


def _attention_sizes(shapes: Shapes) -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """Model, words, and (B, H, N, D)."""
    for batch in (1, 4):
        for name, net in shapes.unets.items():
            for level in net.attending():
                size = (batch, level.heads, level.side**2, level.channels // level.heads)
                yield name, f"UNet {net.pixels} px, {_times(size)}", size
        for name, words, count, tokens, network in shapes.tokens():
            if network.text and count == batch:
                size = (batch, network.heads, tokens + network.text, network.head)
                yield name, f"{words}, {_times(size)}", size


def _operands(count: int, size: tuple[int, ...], settings: Settings) -> tuple[Tensor, ...]:
    return tuple(settings.random(*size) for _ in range(count))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *tangents: Tensor) -> Variant:
    return Variant(functional.scaled_dot_product_attention, (query, key, value), (0, 1, 2))


def _work(size: tuple[int, int, int, int]) -> float:
    """Two products of 2 B H N² D."""
    batch, heads, tokens, head = size
    return 4.0 * batch * heads * tokens**2 * head


def quantised_cases(shapes: Shapes) -> Iterator[Case]:
    """The linear layers of UNets' transformer blocks in 8 bits, beside the same in bfloat16."""
    kinds: tuple[Kind, ...] = ("int8", "fp8")
    for batch in (1, 4):
        for name, net in shapes.unets.items():
            for level in net.attending():
                width, rows = level.channels, batch * level.side**2
                for size in ((width, 8 * width), (4 * width, width), (width, width)):
                    for kind in kinds:
                        yield _quantised(name, f"UNet {net.pixels} px", rows, size, kind)


def _quantised(name: str, words: str, rows: int, size: tuple[int, int], kind: Kind) -> Case:
    def inputs(settings: Settings) -> tuple[Tensor, QuantisedWeight]:
        return settings.random(rows, size[0]), quantise_weight(settings.random(size[1], size[0]), kind)

    def plain(x: Tensor, quantised: QuantisedWeight) -> Variant:
        return Variant(functional.linear, (x, quantised.dequantise().to(x.dtype)))

    return Case(
        "quantised_linear",
        name,
        f"{kind}, {words}, {rows} rows, {size[0]} to {size[1]}",
        quantised_linear,
        quantised_linear_reference,
        inputs,
        rivals={"plain linear": plain},
        work=2.0 * rows * size[0] * size[1],
        ceiling=kind,
    )


def embedding_cases(shapes: Shapes) -> Iterator[Case]:
    """The embedding of the time, whose weights are what must move."""
    sizes = [(name, net.levels[0].channels, 4 * net.levels[0].channels) for name, net in shapes.unets.items()]
    sizes += [(name, min(256, net.hidden), net.hidden) for name, net in shapes.transformers.items()]
    for batch in (1, 4):
        for name, channels, width in sizes:

            def inputs(
                settings: Settings, batch: int = batch, channels: int = channels, width: int = width
            ) -> tuple[Tensor | float, ...]:
                t = 999 * torch.rand(batch, device=settings.device)
                first, second = settings.random(width, channels), settings.random(width, width)
                biases = settings.random(width), settings.random(width)
                return t, channels, first, biases[0], second, biases[1], True, 0.0, 1.0, 10000

            where = f"batch {batch}, {channels} to {width}"
            yield Case("timestep_embedding", name, where, timestep_embedding, timestep_embedding_reference, inputs)


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(str(each) for each in size)
