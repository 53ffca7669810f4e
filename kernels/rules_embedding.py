"""Fused embeddings of the time in transformers; U-Nets keep theirs, whose two layers the network calls apart."""

from typing import Any

import torch
from torch import Tensor, nn

from .operators import timestep_embedding
from .patch import Rule, holds, sites


def _timestep_text(layer: Any, timestep: Tensor, pooled_projection: Tensor) -> Any:
    if not _fits(layer.timestep_embedder):
        return NotImplemented
    return _embedded(timestep, layer.time_proj, layer.timestep_embedder) + layer.text_embedder(pooled_projection)


def _timestep_guidance_text(layer: Any, timestep: Tensor, guidance: Tensor, pooled_projection: Tensor) -> Any:
    if not _fits(layer.timestep_embedder, layer.guidance_embedder):
        return NotImplemented
    time = _embedded(timestep, layer.time_proj, layer.timestep_embedder)
    time = time + _embedded(guidance, layer.time_proj, layer.guidance_embedder)
    return time + layer.text_embedder(pooled_projection)


def _timestep_guidance(layer: Any, timestep: Tensor, guidance: Tensor, hidden_dtype: torch.dtype | None = None) -> Any:
    if not _fits(layer.timestep_embedder, layer.guidance_embedder):
        return NotImplemented
    time = _embedded(timestep, layer.time_proj, layer.timestep_embedder)
    conditioning = time + _embedded(guidance, layer.guidance_condition_proj, layer.guidance_embedder)
    return layer.linear(layer.silu(conditioning)), conditioning


def _timestep_size(
    layer: Any,
    timestep: Tensor,
    resolution: Tensor | None,
    aspect_ratio: Tensor | None,
    batch_size: int,
    hidden_dtype: torch.dtype | None,
) -> Any:
    sizes: list[tuple[Any, Any]] = []
    if layer.use_additional_conditions:
        sizes = [(resolution, layer.resolution_embedder), (aspect_ratio, layer.aspect_ratio_embedder)]
    if not _fits(layer.timestep_embedder, *(embedder for _, embedder in sizes)):
        return NotImplemented
    time = _embedded(timestep, layer.time_proj, layer.timestep_embedder)
    parts = [_embedded(size.flatten(), layer.additional_condition_proj, embedder) for size, embedder in sizes]
    return time + torch.cat([part.reshape(batch_size, -1) for part in parts], dim=1) if parts else time


def _embedded(t: Tensor, projection: Any, embedder: Any) -> Tensor:
    first, second = embedder.linear_1, embedder.linear_2
    return timestep_embedding(
        t,
        projection.num_channels,
        first.weight,
        first.bias,
        second.weight,
        second.bias,
        projection.flip_sin_to_cos,
        projection.downscale_freq_shift,
        projection.scale,
    )


def _fits(*embedders: Any) -> bool:
    """Whether both layers of each are plain (an adapter may wrap them at any time) and no gradient is wanted."""
    plain = holds(linear_1=nn.Linear, linear_2=nn.Linear, act=nn.SiLU, post_act=type(None))
    return not torch.is_grad_enabled() and all(plain(embedder) for embedder in embedders)


_EMBEDDINGS = "diffusers.models.embeddings."
_SANA = "diffusers.models.transformers.sana_transformer."
RULES = (
    Rule(_EMBEDDINGS + "CombinedTimestepTextProjEmbeddings", _timestep_text, sites(timestep_embedding=1)),
    Rule(
        _EMBEDDINGS + "CombinedTimestepGuidanceTextProjEmbeddings", _timestep_guidance_text, sites(timestep_embedding=2)
    ),
    Rule(
        _EMBEDDINGS + "PixArtAlphaCombinedTimestepSizeEmbeddings",
        _timestep_size,
        lambda layer: {"timestep_embedding": 3 if layer.use_additional_conditions else 1},
    ),
    Rule(_SANA + "SanaCombinedTimestepGuidanceEmbeddings", _timestep_guidance, sites(timestep_embedding=2)),
)
