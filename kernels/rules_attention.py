"""Fused attention processors of Stable Diffusion 3.5 and Flux: query and key are normed, and rotated, in one pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .operators import norm_rotary
from .patch import Rule, Sites, class_name

Heads = tuple[Tensor, Tensor, Tensor]
"""Query, key and value (B, N, heads, D)."""
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (N, D)."""


def _joint_attention(
    processor: Any, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
) -> Any:
    heads = _heads(attention, hidden_states)
    if encoder_hidden_states is not None:
        heads = _joined(heads, _heads(attention, encoder_hidden_states, added=True))
    query, key, value = (part.transpose(1, 2) for part in heads)
    attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    tokens = hidden_states.shape[1]
    result = attention.to_out[1](attention.to_out[0](attended[:, :tokens]))
    if encoder_hidden_states is None:
        return result
    rest = attended[:, tokens:]
    return result, rest if attention.context_pre_only else attention.to_add_out(rest)


def _flux_attention(
    processor: Any,
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotation | None = None,
) -> Any:
    if attention.fused_projections:
        return NotImplemented
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    tokens = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
    heads = _heads(attention, hidden_states, _rows(image_rotary_emb, slice(tokens, None)))
    if encoder_hidden_states is not None:
        rotation = _rows(image_rotary_emb, slice(tokens))
        heads = _joined(_heads(attention, encoder_hidden_states, rotation, added=True), heads)
    backend, parallel = processor._attention_backend, processor._parallel_config
    attended = dispatch_attention_fn(*heads, attn_mask=attention_mask, backend=backend, parallel_config=parallel)
    attended = attended.flatten(2)
    if encoder_hidden_states is None:
        return attended
    result = attention.to_out[1](attention.to_out[0](attended[:, tokens:].contiguous()))
    return result, attention.to_add_out(attended[:, :tokens].contiguous())


def _heads(attention: Any, states: Tensor, rotation: Rotation | None = None, added: bool = False) -> Heads:
    """Heads of an attention's own stream, or of the one `added` to it."""
    names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
    width = attention.inner_dim // attention.heads
    query, key, value = (getattr(attention, name)(states).unflatten(-1, (-1, width)) for name in names)
    query_norm, key_norm = _norms(attention, added)
    cos, sin = rotation or (None, None)
    query, key = norm_rotary(query, key, query_norm.weight, key_norm.weight, cos, sin, query_norm.eps)
    return query, key, value


def _norms(attention: Any, added: bool) -> tuple[Any, Any]:
    """Norms of query and key."""
    return (attention.norm_added_q, attention.norm_added_k) if added else (attention.norm_q, attention.norm_k)


def _joined(first: Heads, second: Heads) -> Heads:
    query, key, value = (torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))
    return query, key, value


def _rows(rotation: Rotation | None, rows: slice) -> Rotation | None:
    return rotation and (rotation[0][rows], rotation[1][rows])


def _is_added(attention: Any) -> bool:
    return attention.added_kv_proj_dim is not None


def _sites(attention: Any) -> Sites:
    return {"norm_rotary": 2 if _is_added(attention) else 1}


def _normed_by(processor: str) -> Callable[[Any], bool]:
    """Whether an attention has this processor, and RMSNorms over the head with one epsilon."""
    kinds = (class_name(nn.RMSNorm(1)), "diffusers.models.normalization.RMSNorm")

    def accepts(attention: Any) -> bool:
        if class_name(attention.processor) != processor:
            return False
        pairs = [_norms(attention, added) for added in {False, _is_added(attention)}]
        return all(
            {class_name(norm) for norm in pair} <= {*kinds} and pair[0].eps == pair[1].eps is not None for pair in pairs
        )

    return accepts


_PROCESSORS = "diffusers.models.attention_processor."
_FLUX = "diffusers.models.transformers.transformer_flux."
RULES = (
    Rule(
        _PROCESSORS + "Attention",
        _joint_attention,
        _sites,
        "processor",
        _normed_by(_PROCESSORS + "JointAttnProcessor2_0"),
    ),
    Rule(_FLUX + "FluxAttention", _flux_attention, _sites, "processor", _normed_by(_FLUX + "FluxAttnProcessor")),
)
