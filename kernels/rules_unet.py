"""Fused layers of U-Nets and of their autoencoders: group normalisation with its activation, and GEGLU."""

from typing import Any

from torch import Tensor, nn

from .operators import gated_linear_unit, group_norm_silu
from .patch import Rule, holds, sites


def _resnet_block(block: Any, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
    hidden = _group_norm_silu(block.norm1, input_tensor)
    for resample in (block.upsample, block.downsample):
        if resample is not None:
            input_tensor, hidden = resample(input_tensor), resample(hidden)
    hidden = block.conv1(hidden)
    if block.time_emb_proj is not None:
        temb = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))[:, :, None, None]
    scale = shift = None
    if temb is not None and block.time_embedding_norm == "scale_shift":
        scale, shift = temb.flatten(1).chunk(2, dim=1)
    elif temb is not None and block.time_embedding_norm == "default":
        hidden = hidden + temb
    hidden = block.conv2(block.dropout(_group_norm_silu(block.norm2, hidden, scale, shift)))
    if block.conv_shortcut is not None:
        # As diffusers does: the gradient of a strided input confuses DistributedDataParallel.
        input_tensor = block.conv_shortcut(input_tensor.contiguous() if block.training else input_tensor)
    result: Tensor = (input_tensor + hidden) / block.output_scale_factor
    return result


def _group_norm_silu(norm: Any, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, scale, shift)


def _group_norm(norm: Any, x: Tensor) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=False)


def _already_activated(_: Any, x: Tensor) -> Tensor:
    """In place of the SiLU behind a norm that has applied it."""
    return x


def _geglu(layer: Any, hidden_states: Tensor) -> Tensor:
    return gated_linear_unit(layer.proj(hidden_states), "gelu")


def _swiglu(layer: Any, hidden_states: Tensor) -> Tensor:
    return gated_linear_unit(layer.proj(hidden_states), "silu")


def _ending(network: str) -> tuple[Rule, Rule]:
    """The norm and the activation before a network's last convolution."""
    both = holds(conv_norm_out=nn.GroupNorm, conv_act=nn.SiLU)
    return (
        Rule(network, _group_norm_silu, sites(group_norm_silu=1), "conv_norm_out", both),
        Rule(network, _already_activated, sites(), "conv_act", both),
    )


RULES = (
    Rule(
        "diffusers.models.resnet.ResnetBlock2D",
        _resnet_block,
        sites(group_norm_silu=2),
        accepts=holds(norm1=nn.GroupNorm, norm2=nn.GroupNorm, nonlinearity=nn.SiLU),
    ),
    Rule(
        "diffusers.models.transformers.transformer_2d.Transformer2DModel",
        _group_norm,
        sites(group_norm_silu=1),
        "norm",
        holds(norm=nn.GroupNorm),
    ),
    Rule(
        "diffusers.models.attention_processor.Attention",
        _group_norm,
        sites(group_norm_silu=1),
        "group_norm",
        holds(group_norm=nn.GroupNorm),
    ),
    *_ending("diffusers.models.unets.unet_2d_condition.UNet2DConditionModel"),
    *_ending("diffusers.models.unets.unet_2d.UNet2DModel"),
    *_ending("diffusers.models.autoencoders.vae.Encoder"),
    *_ending("diffusers.models.autoencoders.vae.Decoder"),
    Rule("diffusers.models.activations.GEGLU", _geglu, sites(gated_linear_unit=1)),
    Rule("diffusers.models.activations.SwiGLU", _swiglu, sites(gated_linear_unit=1)),
)
