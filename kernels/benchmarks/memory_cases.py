"""Operations whose time is that of the bytes they move."""

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

from ..adaptive_norm import (
    adaptive_norm,
    adaptive_norm_reference,
    gated_residual,
    gated_residual_norm,
    gated_residual_norm_reference,
    gated_residual_reference,
)
from ..distribution_matching import distribution_matching_gradient, distribution_matching_gradient_reference
from ..gated_linear_unit import gated_linear_unit, gated_linear_unit_reference
from ..group_norm import group_norm_silu, group_norm_silu_reference
from ..philox import gaussian_noise_reference, pack_seeds
from ..rotary import norm_rotary, norm_rotary_reference
from ..sampler_step import Coefficients, sampler_step, sampler_step_reference
from . import liger
from .measure import Case, Settings
from .shapes import Level, Shapes

GROUPS, EPSILON = 32, 1e-5


def group_norm_cases(shapes: Shapes) -> Iterator[Case]:
    """GroupNorm and SiLU of every UNet level, of the decoder's, and channels last."""
    levels = [(name, f"UNet {net.pixels} px", level) for name, net in shapes.unets.items() for level in net.levels]
    levels += [("SDXL", "decoder", level) for level in shapes.decoder]
    for name, part, level in levels:
        yield _group_norm(name, part, level, 1, torch.contiguous_format)
    for name, part, level in levels:
        yield _group_norm(name, part, level, 1, torch.channels_last)
    for name, part, level in levels[: -len(shapes.decoder)]:
        yield _group_norm(name, part, level, 4, torch.channels_last)


def _group_norm(name: str, part: str, level: Level, batch: int, layout: torch.memory_format) -> Case:
    def inputs(settings: Settings) -> tuple[Tensor, int, Tensor, Tensor, float]:
        x = settings.random(batch, level.channels, level.side, level.side).to(memory_format=layout)
        return x, GROUPS, settings.random(level.channels), settings.random(level.channels), EPSILON

    where = f"{part}, {batch} x {level.channels} x {level.side}²"
    return Case(
        "group_norm_silu",
        name,
        where + (", channels last" if layout == torch.channels_last else ""),
        group_norm_silu,
        group_norm_silu_reference,
        inputs,
        trained=(0, 2, 3),
        rivals=liger.liger(liger.group_norm_silu),
    )


def modulation_cases(shapes: Shapes) -> Iterator[Case]:
    """Adaptive LayerNorm, which Liger has not, and adaptive RMSNorm."""
    for kind in ("layer", "rms"):
        for name, words, batch, tokens, network in shapes.tokens():
            size = (batch, tokens, network.hidden)

            def inputs(settings: Settings, size: tuple[int, ...] = size, kind: str = kind) -> tuple[object, ...]:
                scale, shift = (settings.random(size[0], size[2]) for _ in range(2))
                return settings.random(*size), scale, shift, None, None, 1e-6, kind

            yield Case(
                "adaptive_norm",
                name,
                f"{kind}, {words}, {_times(size)}",
                adaptive_norm,
                adaptive_norm_reference,
                inputs,
                trained=(0, 1, 2),
                rivals=liger.liger(liger.modulated_rms_norm) if kind == "rms" else {},
            )


def norm_cases(shapes: Shapes) -> Iterator[Case]:
    """LayerNorm and RMSNorm with weights and no modulation, as in the transformer blocks of UNets."""
    for kind, rival in (("layer", liger.layer_norm), ("rms", liger.rms_norm)):
        for name, net in shapes.unets.items():
            for level in net.attending():
                size = (1, level.side**2, level.channels)

                def inputs(settings: Settings, size: tuple[int, ...] = size, kind: str = kind) -> tuple[object, ...]:
                    bias = settings.random(size[2]) if kind == "layer" else None
                    return settings.random(*size), None, None, settings.random(size[2]), bias, EPSILON, kind

                yield Case(
                    "norm with weights",
                    name,
                    f"{kind}, UNet {net.pixels} px, {_times(size)}",
                    adaptive_norm,
                    adaptive_norm_reference,
                    inputs,
                    trained=(0, 3, 4) if kind == "layer" else (0, 3),
                    rivals=liger.liger(rival),
                )


def residual_cases(shapes: Shapes) -> Iterator[Case]:
    """The gated residual, with the norm that follows it and without."""
    for name, words, batch, tokens, network in shapes.tokens():
        size = (batch, tokens, network.hidden)

        def alone(settings: Settings, size: tuple[int, ...] = size) -> tuple[Tensor, ...]:
            return settings.random(*size), settings.random(*size), settings.random(size[0], size[2])

        def normed(settings: Settings, size: tuple[int, ...] = size) -> tuple[Tensor, ...]:
            return *alone(settings, size), settings.random(size[0], size[2]), settings.random(size[0], size[2])

        where = f"{words}, {_times(size)}"
        yield Case(
            "gated_residual_norm",
            name,
            where,
            gated_residual_norm,
            gated_residual_norm_reference,
            normed,
            trained=(0, 1, 2, 3, 4),
        )
        yield Case(
            "gated_residual",
            name,
            where,
            gated_residual,
            gated_residual_reference,
            alone,
            trained=(0, 1, 2),
            passed_on=1,
        )


def rotary_cases(shapes: Shapes) -> Iterator[Case]:
    """RMSNorm of queries and keys with the rotation that follows it; Sana's and SD3.5's have no rotation."""
    for name, words, batch, tokens, network in shapes.tokens():
        size = (batch, tokens + network.text, network.heads, network.head)
        rotates = name == "Flux"

        def inputs(
            settings: Settings, size: tuple[int, ...] = size, rotates: bool = rotates
        ) -> tuple[Tensor | float | None, ...]:
            query, key = settings.random(*size), settings.random(*size)
            angles = settings.random(size[1], size[3], dtype=torch.float32)
            turn = (angles.cos(), angles.sin()) if rotates else (None, None)
            return query, key, settings.random(size[3]), settings.random(size[3]), *turn, 1e-6

        yield Case(
            "norm_rotary",
            name,
            f"{words}, {_times(size)}" + ("" if rotates else ", no rotation"),
            norm_rotary,
            norm_rotary_reference,
            inputs,
            trained=(0, 1, 2, 3),
            rivals=liger.liger(liger.norm_rotary) if rotates else {},
        )


def gate_cases(shapes: Shapes) -> Iterator[Case]:
    """GEGLU of the UNets' transformer blocks; SiLU along the channels of Sana's convolutions."""
    for batch in (1, 4):
        for name, net in shapes.unets.items():
            for level in net.attending():
                yield _gate(name, f"UNet {net.pixels} px", (batch, level.side**2, 8 * level.channels), "gelu", -1)
    for name, words, batch, tokens, network in shapes.tokens():
        if name in ("Sana", "built-in"):
            side = isqrt(tokens)
            yield _gate(name, words, (batch, 2 * network.inner, side, side), "silu", 1)


def _gate(name: str, words: str, size: tuple[int, ...], activation: str, dim: int) -> Case:
    return Case(
        "gated_linear_unit",
        name,
        f"{activation}, {words}, {_times(size)}",
        gated_linear_unit,
        gated_linear_unit_reference,
        lambda settings: (settings.random(*size), activation, dim),
        trained=(0,),
        rivals=liger.liger(liger.gated_linear_unit),
    )


def step_cases(shapes: Shapes) -> Iterator[Case]:
    """A sampler's step with guidance and fresh noise, in the UNets' latent spaces."""
    coefficients = Coefficients.consistency("epsilon", (0.6, 0.8), (0.8, 0.6), guidance=2.0)
    for batch in (1, 4, 64):
        for name, size in _latents(shapes):

            def inputs(
                settings: Settings, size: tuple[int, ...] = size, batch: int = batch
            ) -> tuple[Tensor | Coefficients | int, ...]:
                seeds = pack_seeds(range(batch), settings.device)
                return settings.random(batch, *size), settings.random(2 * batch, *size), coefficients, seeds, 1

            where = f"latent {batch} x {_times(size)}"
            yield Case("sampler_step", name, where, sampler_step, sampler_step_reference, inputs)


def matching_cases(shapes: Shapes) -> Iterator[Case]:
    """The distribution-matching gradient in float32, as training calls it."""
    for batch in (4, 64, 1):
        for name, size in _latents(shapes):

            def inputs(settings: Settings, size: tuple[int, ...] = (batch, *size)) -> tuple[Tensor, ...]:
                first, second, third = (settings.random(*size, dtype=torch.float32) for _ in range(3))
                return first, second, third

            yield Case(
                "distribution_matching_gradient",
                name,
                f"latent {batch} x {_times(size)}, float32",
                distribution_matching_gradient,
                distribution_matching_gradient_reference,
                inputs,
            )


def noise_cases(shapes: Shapes) -> Iterator[Case]:
    """The noise of one draw, from seeds that lie on the device."""
    for batch in (4, 64):
        for name, size in _latents(shapes):

            def inputs(
                settings: Settings, size: tuple[int, ...] = size, batch: int = batch
            ) -> tuple[Tensor, int, tuple[int, ...]]:
                return pack_seeds(range(batch), settings.device), 0, size

            where = f"latent {batch} x {_times(size)}, float32"
            yield Case("gaussian_noise", name, where, _noise, gaussian_noise_reference, inputs)


def _noise(seeds: Tensor, step: int, size: tuple[int, ...]) -> Tensor:
    """`gaussian_noise` without the seeds' way to the device."""
    if not seeds.is_cuda:
        return gaussian_noise_reference(seeds, step, size)
    from ..philox_triton import launch

    return launch(seeds, step, size)


def _latents(shapes: Shapes) -> Iterator[tuple[str, tuple[int, int, int]]]:
    for name, net in shapes.unets.items():
        yield name, (net.latent, net.levels[0].side, net.levels[0].side)
    for name, network in shapes.transformers.items():
        # SD3's and Flux's patches are of 2 x 2 latents.
        side = isqrt(max(network.tokens.values())) * (2 if network.text else 1)
        yield name, (network.latent, side, side)


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(str(each) for each in size)
