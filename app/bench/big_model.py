"""A student of the size of Stable Diffusion 1.5 with random weights: as slow as a trained one, and no download."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.artefact import save_artefact
from ...runtime.families import save_part, stable_diffusion
from ...runtime.files import write_json

CHARACTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]


@dataclass(frozen=True)
class Shape:
    """Sizes, by default those of Stable Diffusion 1.5.

    Args:
        latent: height and width of a latent; a picture's are `2 ** (len(channels) - 1)` times as large.
        channels: of the network's resolutions.
        decoder_channels: of the KL decoder's.
        heads: of each attention in the network.
        width: of the text states.
        layers: of the text encoder.
        groups: of the normalisations.
    """

    latent: int = 64
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    decoder_channels: tuple[int, ...] = (128, 256, 512, 512)
    heads: int = 8
    width: int = 768
    layers: int = 12
    groups: int = 32


def build(directory: Path, decoder: str, shape: Shape | None = None) -> None:
    """Write a one-step student that stock `StableDiffusionPipeline.from_pretrained` opens.

    Args:
        directory: where to.
        decoder: `kl`, or `tiny` for an `AutoencoderTiny`.
        shape: its sizes.
    """
    shape = shape or Shape()
    torch.manual_seed(0)
    unet, vae = _unet(shape), _decoder(shape, decoder)
    card = {
        "kind": "student",
        "method": "none",
        "steps": [1],
        "times": {"1": [1.0, 0.0]},
        "sampler": "consistency",
        "guidance": 1.0,
    }

    def write(folder: Path) -> None:
        with TemporaryDirectory(dir=directory.parent) as teacher:
            _write_teacher(Path(teacher), vae, shape)
            stable_diffusion.save_student(folder, unet, Path(teacher), "consistency")

    save_artefact(directory, write, card)


def _unet(shape: Shape) -> Any:
    from diffusers import UNet2DConditionModel

    deepest = len(shape.channels) - 1
    unet = UNet2DConditionModel(
        sample_size=shape.latent,
        block_out_channels=shape.channels,
        down_block_types=("CrossAttnDownBlock2D",) * deepest + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * deepest,
        cross_attention_dim=shape.width,
        attention_head_dim=shape.heads,
        norm_num_groups=shape.groups,
    )
    text = torch.randn(1, 8, shape.width)
    _set_spread(unet.conv_out, lambda: unet(torch.randn(1, 4, 16, 16), 999, text).sample, 1.0)
    return unet


def _decoder(shape: Shape, decoder: str) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    if decoder == "tiny":
        count = len(shape.channels)
        stages = {"encoder_block_out_channels": (64,) * count, "decoder_block_out_channels": (64,) * count}
        blocks = {"num_encoder_blocks": (1, *[3] * (count - 1)), "num_decoder_blocks": (*[3] * (count - 1), 1)}
        vae = AutoencoderTiny(**stages, **blocks)
        last = vae.decoder.layers[-1]
    else:
        count = len(shape.decoder_channels)
        vae = AutoencoderKL(
            latent_channels=4,
            block_out_channels=shape.decoder_channels,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * count,
            up_block_types=("UpDecoderBlock2D",) * count,
            norm_num_groups=shape.groups,
            sample_size=shape.latent * 2 ** (count - 1),
            scaling_factor=0.18215,
        )
        last = vae.decoder.conv_out
    latents = torch.randn(1, 4, 16, 16) / vae.config.scaling_factor
    _set_spread(last, lambda: vae.decode(latents).sample, 0.5)
    return vae


@torch.no_grad()
def _set_spread(layer: nn.Module, call: Callable[[], Tensor], spread: float) -> None:
    """Scale the last layer so that the result has this standard deviation, as if it had been trained.

    Pictures of random weights would else be all but grey, and agree whatever went wrong.
    """
    assert isinstance(layer.weight, Tensor)
    layer.weight *= spread / call().std()


def _write_teacher(folder: Path, vae: Any, shape: Shape) -> None:
    """All that a student takes over from its teacher."""
    from diffusers import DDIMScheduler, __version__
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS)]
    config = CLIPTextConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64 or 1,
        projection_dim=shape.width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    known = {word: number for number, word in enumerate(words)}
    place = folder / "tokenizer"
    place.mkdir()
    vocabulary, merges = place / "vocab.json", place / "merges.txt"  # kept: older versions of transformers read them
    write_json(vocabulary, {**known, "<|startoftext|>": config.bos_token_id, "<|endoftext|>": config.eos_token_id})
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=config.max_position_embeddings)
    tokenizer.save_pretrained(place)
    save_part(CLIPTextModel(config), folder / "text_encoder")
    _name_as_published(folder / "text_encoder" / "model.safetensors")
    save_part(vae, folder / "vae")
    (folder / "unet").mkdir()  # listed below, and the student's own
    process = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    # Not the noise, as the real one does: divided by the little that is left of the picture, rounding would show.
    DDIMScheduler(**process, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": __version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(vae).__name__],
    }
    write_json(folder / "model_index.json", index)


def _name_as_published(file: Path) -> None:
    """Put `text_model.` before the names of a text encoder's weights, as published models have it.

    The versions of transformers that optimum takes (4.57, 5.5) know no other names: what they do not find is random.
    """
    from safetensors.torch import load_file, save_file

    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
