"""Fused normalisation layers: those that take the time (adaLN), and RMSNorm."""

from typing import Any

from torch import Tensor, nn

from .operators import adaptive_norm, gated_residual_norm
from .patch import Rule, class_name, sites

_PATH = "diffusers.models.normalization."
RMS_NORM = _PATH + "RMSNorm"


def modulated(norm: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """`(1 + scale) * norm(x) + shift` with the parameters of a norm layer."""
    return adaptive_norm(x, scale, shift, norm.weight, norm.bias, norm.eps, "layer" if _is_layer_norm(norm) else "rms")


def residual_modulated(
    norm: nn.LayerNorm,
    stream: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`stream + gate * branch`, and that sum modulated; without what is None."""
    return gated_residual_norm(stream, branch, gate, scale, shift, norm.weight, norm.bias, norm.eps)


def has_norm(layer: Any) -> bool:
    """Whether `modulated` computes what a layer's `norm` does."""
    return _is_layer_norm(layer.norm) or class_name(layer.norm) == RMS_NORM


def _is_layer_norm(norm: Any) -> bool:
    return type(norm) is nn.LayerNorm or class_name(norm) == _PATH + "FP32LayerNorm"


def rms_norm(norm: Any, x: Tensor) -> Any:
    """Forward of an RMSNorm."""
    # Rows that are not contiguous (channels moved last) would be copied there and back: plain torch keeps their layout.
    if x.ndim < 3 or not x.is_contiguous():
        return NotImplemented
    return modulated(norm, x.flatten(1, -2), None, None).view_as(x)


def _zero(layer: Any, x: Tensor, emb: Tensor, count: int) -> tuple[Tensor, ...]:
    shift, scale, *rest = layer.linear(layer.silu(emb)).chunk(count, dim=1)
    return modulated(layer.norm, x, scale, shift), *rest


def _ada_layer_norm_zero(
    layer: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: Any = None,
    emb: Any = None,
) -> tuple[Tensor, ...]:
    if layer.emb is not None:
        emb = layer.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    return _zero(layer, x, emb, 6)


def _ada_layer_norm_zero_single(layer: Any, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
    return _zero(layer, x, emb, 3)


def _ada_layer_norm_zero_x(layer: Any, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
    """Stable Diffusion 3.5's: one norm, modulated twice, for two attentions."""
    *first, shift_2, scale_2, gate_2 = _zero(layer, hidden_states, emb, 9)
    return *first, modulated(layer.norm, hidden_states, scale_2, shift_2), gate_2


def _ada_layer_norm_continuous(layer: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = layer.linear(layer.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return modulated(layer.norm, x, scale, shift)


RULES = (
    Rule(_PATH + "AdaLayerNormZero", _ada_layer_norm_zero, sites(adaptive_norm=1), accepts=has_norm),
    Rule(_PATH + "AdaLayerNormZeroSingle", _ada_layer_norm_zero_single, sites(adaptive_norm=1), accepts=has_norm),
    Rule(_PATH + "SD35AdaLayerNormZeroX", _ada_layer_norm_zero_x, sites(adaptive_norm=2), accepts=has_norm),
    Rule(_PATH + "AdaLayerNormContinuous", _ada_layer_norm_continuous, sites(adaptive_norm=1), accepts=has_norm),
)
