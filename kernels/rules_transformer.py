"""Fused transformer blocks: of Stable Diffusion 1 to 3 and XL, PixArt and Flux."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .operators import gated_residual
from .patch import Rule, Sites, holds, sites
from .rules_normalisation import modulated, residual_modulated

Options = dict[str, Any]


def modulation(block: Any, timestep: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate (B, 1, D) of attention, then of the feed-forward network, from (B, 6 D) (adaLN-single)."""
    table: Tensor = block.scale_shift_table
    return (table + timestep.reshape(timestep.shape[0], 6, -1)).chunk(6, dim=1)


def gated_stream(stream: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """`stream + gate * branch`, as wide as the wider of stream and gate: under autocast those gates are float32."""
    return gated_residual(stream.to(torch.promote_types(stream.dtype, gate.dtype)), branch, gate)


def _unet_block(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: Options | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: Options | None = None,
) -> Any:
    if hidden_states.ndim != 3 or block._chunk_size is not None:
        return NotImplemented
    options = cross_attention_kwargs or {}
    stream = hidden_states.contiguous()  # once: it may be a convolution's result with the channels moved last
    attended = block.attn1(modulated(block.norm1, stream, None, None), attention_mask=attention_mask, **options)
    stream, normed = residual_modulated(block.norm2, stream, attended)
    crossed = block.attn2(
        normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **options
    )
    stream, normed = residual_modulated(block.norm3, stream, crossed)
    return block.ff(normed) + stream


def _pixart_block(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: Options | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: Options | None = None,
) -> Any:
    if timestep is None or hidden_states.ndim != 3 or block._chunk_size is not None:
        return NotImplemented
    options = cross_attention_kwargs or {}
    shift, scale, gate, feed_shift, feed_scale, feed_gate = modulation(block, timestep)
    normed = modulated(block.norm1, hidden_states, scale, shift)
    stream = gated_stream(hidden_states, block.attn1(normed, attention_mask=attention_mask, **options), gate)
    crossed = block.attn2(
        stream, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **options
    )
    stream, normed = residual_modulated(block.norm2, stream, crossed, None, feed_scale, feed_shift)
    return gated_stream(stream, block.ff(normed), feed_gate)


def _has_norms(norm_type: str, *norms: str) -> Callable[[Any], bool]:
    """Whether a block is of this type, with these LayerNorms, and attends to itself and then to the text only."""
    layer_norms = holds(**dict.fromkeys(norms, nn.LayerNorm))

    def accepts(block: Any) -> bool:
        cross_attends = block.attn2 is not None and not block.only_cross_attention
        plain = block.pos_embed is None and not hasattr(block, "fuser")
        return block.norm_type == norm_type and cross_attends and plain and layer_norms(block)

    return accepts


def _joint_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: Options | None = None,
) -> Any:
    if block._chunk_size is not None:
        return NotImplemented
    options = joint_attention_kwargs or {}
    normed, gate, *rest = block.norm1(hidden_states, emb=temb)
    if block.context_pre_only:
        context_normed = block.norm1_context(encoder_hidden_states, temb)
    else:
        context_normed, *context_rest = block.norm1_context(encoder_hidden_states, emb=temb)
    attended, context_attended = block.attn(hidden_states=normed, encoder_hidden_states=context_normed, **options)
    if block.use_dual_attention:
        *rest, normed_2, gate_2 = rest
        hidden_states = gated_residual(hidden_states, attended, gate)
        attended, gate = block.attn2(hidden_states=normed_2, **options), gate_2
    stream = _after_attention(hidden_states, attended, block.norm2, block.ff, (gate, *rest))
    if block.context_pre_only:
        return None, stream
    context = _after_attention(
        encoder_hidden_states, context_attended, block.norm2_context, block.ff_context, context_rest
    )
    return context, stream


def _after_attention(
    stream: Tensor, attended: Tensor, norm: nn.LayerNorm, feed_forward: nn.Module, rest: Sequence[Tensor]
) -> Tensor:
    """The second half of a block, given what adaLN-zero keeps for it: a gate, shift, scale and a gate."""
    gate, shift, scale, feed_gate = rest
    stream, normed = residual_modulated(norm, stream, attended, gate, scale, shift)
    return gated_residual(stream, feed_forward(normed), feed_gate)


def _joint_sites(block: Any) -> Sites:
    streams = 1 if block.context_pre_only else 2
    return {"gated_residual": streams + bool(block.use_dual_attention), "gated_residual_norm": streams}


def _flux_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: Options | None = None,
) -> tuple[Tensor, Tensor]:
    normed, *rest = block.norm1(hidden_states, emb=temb)
    context_normed, *context_rest = block.norm1_context(encoder_hidden_states, emb=temb)
    attended, context_attended, *adapters = block.attn(
        hidden_states=normed,
        encoder_hidden_states=context_normed,
        image_rotary_emb=image_rotary_emb,
        **joint_attention_kwargs or {},
    )
    stream = _after_attention(hidden_states, attended, block.norm2, block.ff, rest)
    context = _after_attention(
        encoder_hidden_states, context_attended, block.norm2_context, block.ff_context, context_rest
    )
    for adapter in adapters:  # an image prompt's
        stream = stream + adapter
    return _in_range(context), stream


def _flux_single_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: Options | None = None,
) -> tuple[Tensor, Tensor]:
    tokens = encoder_hidden_states.shape[1]
    stream = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate = block.norm(stream, emb=temb)
    attended = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **joint_attention_kwargs or {})
    branch = block.proj_out(torch.cat([attended, block.act_mlp(block.proj_mlp(normed))], dim=2))
    stream = _in_range(gated_residual(stream, branch, gate))
    return stream[:, :tokens], stream[:, tokens:]


def _in_range(stream: Tensor) -> Tensor:
    """Infinities of float16 as its largest numbers, as diffusers does it."""
    return stream.clip(-65504, 65504) if stream.dtype == torch.float16 else stream


_BLOCK_NORMS = holds(norm2=nn.LayerNorm)
_PATH = "diffusers.models.attention."
_FLUX = "diffusers.models.transformers.transformer_flux."
RULES = (
    Rule(
        _PATH + "BasicTransformerBlock",
        _unet_block,
        sites(adaptive_norm=1, gated_residual_norm=2),
        accepts=_has_norms("layer_norm", "norm1", "norm2", "norm3"),
    ),
    Rule(
        _PATH + "BasicTransformerBlock",
        _pixart_block,
        sites(adaptive_norm=1, gated_residual=2, gated_residual_norm=1),
        accepts=_has_norms("ada_norm_single", "norm1", "norm2"),
    ),
    Rule(_PATH + "JointTransformerBlock", _joint_block, _joint_sites, accepts=_BLOCK_NORMS),
    Rule(
        _FLUX + "FluxTransformerBlock",
        _flux_block,
        sites(gated_residual=2, gated_residual_norm=2),
        accepts=_BLOCK_NORMS,
    ),
    Rule(_FLUX + "FluxSingleTransformerBlock", _flux_single_block, sites(gated_residual=1)),
)
