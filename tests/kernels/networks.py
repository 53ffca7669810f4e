"""Tiny networks of diffusers with random weights, one a family, and arguments for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Arguments = dict[str, Any]
Family = Callable[[], tuple[nn.Module, Arguments]]


def unet(**options: Any) -> tuple[nn.Module, Arguments]:
    """Stable Diffusion's: two resolutions, attention in the first."""
    from diffusers import UNet2DConditionModel

    shape = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    network = UNet2DConditionModel(**shape, **blocks, cross_attention_dim=6, attention_head_dim=4, **options)
    return network, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([999, 20]),
        "encoder_hidden_states": torch.randn(2, 3, 6),
    }


def sdxl_unet() -> tuple[nn.Module, Arguments]:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    }
    network, arguments = unet(use_linear_projection=True, transformer_layers_per_block=2, **added)
    return network, arguments | {"added_cond_kwargs": {"text_embeds": torch.randn(2, 8), "time_ids": torch.rand(2, 6)}}


def scale_shift_unet() -> tuple[nn.Module, Arguments]:
    """Modulated group norms, and blocks that resample between their norms."""
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=4,
    )
    return network, {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([999, 20])}


def autoencoder() -> tuple[nn.Module, Arguments]:
    from diffusers import AutoencoderKL

    network = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return network, {"sample": torch.randn(2, 3, 8, 8)}


def stable_diffusion_3() -> tuple[nn.Module, Arguments]:
    """Version 3.5's: query and key normed, a second attention in the first block, no context after the last."""
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        out_channels=4,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return network, {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(2, 3, 6),
        "pooled_projections": torch.randn(2, 5),
        "timestep": torch.tensor([999.0, 20.5]),
    }


def flux() -> tuple[nn.Module, Arguments]:
    """A block of two streams, then one of one."""
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return network, {
        "hidden_states": torch.randn(2, 4, 4),
        "encoder_hidden_states": torch.randn(2, 3, 6),
        "pooled_projections": torch.randn(2, 5),
        "timestep": torch.tensor([0.9, 0.1]),
        "guidance": torch.tensor([3.5, 1.0]),
        "img_ids": torch.randint(5, (4, 3)),
        "txt_ids": torch.zeros(3, 3),
    }


def sana(**options: Any) -> tuple[nn.Module, Arguments]:
    from diffusers import SanaTransformer2DModel

    network = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=6,
        sample_size=4,
        **options,
    )
    return network, {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(2, 3, 6),
        "timestep": torch.tensor([999.0, 20.5]),
    }


def sana_sprint() -> tuple[nn.Module, Arguments]:
    """Query and key normed over all heads, and the guidance scale as an input."""
    network, arguments = sana(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return network, arguments | {"guidance": torch.tensor([3.5, 1.0])}


def sana_autoencoder() -> tuple[nn.Module, Arguments]:
    """Channels last, as the rows of its norms are contiguous only then."""
    from diffusers import AutoencoderDC

    both: Arguments = {"encoder_block_types": ("ResBlock", "EfficientViTBlock")}
    both |= {"decoder_block_types": ("ResBlock", "EfficientViTBlock")}
    scales: Arguments = {"encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,))}
    layers: Arguments = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    channels: Arguments = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    norms: Arguments = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
    network = AutoencoderDC(latent_channels=4, attention_head_dim=4, **both, **scales, **layers, **channels, **norms)
    network.to(memory_format=torch.channels_last)
    return network, {"sample": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)}


def pixart() -> tuple[nn.Module, Arguments]:
    """Size and aspect ratio of the image as inputs."""
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=12,
        sample_size=4,
        caption_channels=6,
        use_additional_conditions=True,
    )
    return network, {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(2, 3, 6),
        "timestep": torch.tensor([999, 20]),
        "added_cond_kwargs": {"resolution": torch.rand(2, 2), "aspect_ratio": torch.rand(2, 1)},
    }


def build(family: Family) -> tuple[nn.Module, Arguments]:
    """A network in whose parameters no zero or one hides a mistake."""
    torch.manual_seed(1)  # with 0, a normaliser of Sana's linear attention is next to nothing
    network, arguments = family()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network, arguments


def run(network: nn.Module, arguments: Arguments) -> Tensor:
    result: Tensor = network(**arguments, return_dict=False)[0]
    return result
