"""Fused layers of Sana's transformer and of its autoencoder (DC-AE)."""

from typing import Any

from torch import Tensor, nn

from .operators import gated_linear_unit
from .patch import Rule, holds, sites
from .rules_normalisation import RMS_NORM, has_norm, modulated, residual_modulated, rms_norm
from .rules_transformer import gated_stream, modulation


def _sana_block(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    height: int = 1,
    width: int = 1,
) -> Tensor:
    shift, scale, gate, feed_shift, feed_scale, feed_gate = modulation(block, timestep)
    attended = block.attn1(modulated(block.norm1, hidden_states, scale, shift))
    stream = gated_stream(hidden_states, attended, gate)
    crossed = block.attn2(stream, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    stream, normed = residual_modulated(block.norm2, stream, crossed, None, feed_scale, feed_shift)
    branch = block.ff(normed.transpose(1, 2).reshape(normed.shape[0], -1, height, width))
    return gated_stream(stream, branch.flatten(2).transpose(1, 2), feed_gate)


def _sana_modulated_norm(layer: Any, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
    shift, scale = (scale_shift_table + temb[:, None].to(scale_shift_table.device)).chunk(2, dim=1)
    return modulated(layer.norm, hidden_states, scale, shift)


def _glu_mb_conv(layer: Any, hidden_states: Tensor) -> Tensor:
    hidden = layer.conv_depth(layer.nonlinearity(layer.conv_inverted(hidden_states)))
    hidden = layer.conv_point(gated_linear_unit(hidden, "silu", dim=1))
    if layer.norm_type == "rms_norm":
        hidden = layer.norm(hidden.movedim(1, -1)).movedim(-1, 1)
    return hidden + hidden_states if layer.residual_connection else hidden  # type: ignore[no-any-return]


def _rms_norm_part(owner: str, part: str) -> Rule:
    """A child that is an RMSNorm of diffusers."""
    return Rule(owner, rms_norm, sites(adaptive_norm=1), part, holds(**{part: RMS_NORM}))


def _head_norm_part(part: str, processor: str) -> Rule:
    """The norm of all heads of a query or key together."""
    accepts = holds(**{part: RMS_NORM, "processor": processor})
    return Rule(_ATTENTION + "Attention", rms_norm, sites(adaptive_norm=1), part, accepts)


_SANA = "diffusers.models.transformers.sana_transformer."
_ATTENTION = "diffusers.models.attention_processor."
_AUTOENCODER = "diffusers.models.autoencoders.autoencoder_dc."
RULES = (
    Rule(
        _SANA + "SanaTransformerBlock",
        _sana_block,
        sites(adaptive_norm=1, gated_residual=2, gated_residual_norm=1),
        accepts=holds(norm1=nn.LayerNorm, norm2=nn.LayerNorm, attn2=_ATTENTION + "Attention"),
    ),
    Rule(_SANA + "SanaModulatedNorm", _sana_modulated_norm, sites(adaptive_norm=1), accepts=has_norm),
    Rule(_SANA + "GLUMBConv", _glu_mb_conv, sites(gated_linear_unit=1), accepts=holds(nonlinearity=nn.SiLU)),
    _rms_norm_part(_SANA + "SanaTransformer2DModel", "caption_norm"),
    _rms_norm_part(_SANA + "GLUMBConv", "norm"),
    _rms_norm_part(_AUTOENCODER + "ResBlock", "norm"),
    _rms_norm_part(_AUTOENCODER + "Decoder", "norm_out"),
    _rms_norm_part(_ATTENTION + "SanaMultiscaleLinearAttention", "norm_out"),
    *(_head_norm_part(part, _ATTENTION + "SanaLinearAttnProcessor2_0") for part in ("norm_q", "norm_k")),
    *(_head_norm_part(part, _SANA + "SanaAttnProcessor2_0") for part in ("norm_q", "norm_k")),
)
