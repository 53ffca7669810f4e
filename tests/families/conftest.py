"""Tiny pipelines of random weights, saved by stock diffusers as users have them on disk."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
TOKENS = 16
"""Of the CLIPs: a prompt is spelt, letter by letter."""


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.x: predicts the noise."""
    return save_stable_diffusion(tmp_path_factory.mktemp("stable-diffusion"), "epsilon")


@pytest.fixture(scope="session")
def stable_diffusion_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 2.x: predicts the velocity."""
    return save_stable_diffusion(tmp_path_factory.mktemp("stable-diffusion-2"), "v_prediction")


@pytest.fixture(scope="session")
def stable_diffusion_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 3 as it is used with little memory: without T5."""
    return save_stable_diffusion_3(tmp_path_factory.mktemp("stable-diffusion-3"), t5=False)


@pytest.fixture(scope="session")
def stable_diffusion_3_with_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 3 with all three text encoders."""
    return save_stable_diffusion_3(tmp_path_factory.mktemp("stable-diffusion-3-t5"), t5=True)


@pytest.fixture(scope="session")
def stock() -> Callable[[Path], Any]:
    """Open a directory with diffusers alone, but for the parts that its index leaves out."""

    def opened(directory: Path) -> Any:
        from diffusers import DiffusionPipeline

        index = json.loads((directory / "model_index.json").read_text())
        left_out = {name: None for name, part in index.items() if part == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(directory, local_files_only=True, **left_out)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return opened


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures, 16x16, to train on."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "train").mkdir()
    for colour in ("red", "green", "blue", "white"):
        Image.new("RGB", (16, 16), colour).save(folder / "train" / f"{colour}.png")
        (folder / "train" / f"{colour}.txt").write_text(f"a {colour} square")
    return folder


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """No bars from loading and saving."""
    from fewstep.runtime.quiet import quiet

    with quiet("diffusers"), quiet("transformers"):
        yield


def save_stable_diffusion(directory: Path, prediction: str) -> Path:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(channels=4),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=spelling_tokenizer(directory),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory / "model")
    return directory / "model"


def save_stable_diffusion_3(directory: Path, t5: bool) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    t5_config = T5Config(vocab_size=160, d_model=32, d_ff=32, d_kv=8, num_heads=2, num_layers=1, num_decoder_layers=1)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(channels=4, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=spelling_tokenizer(directory),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=spelling_tokenizer(directory),
        text_encoder_3=T5EncoderModel(t5_config) if t5 else None,
        tokenizer_3=T5TokenizerFast(vocab=pieces) if t5 else None,
    )
    pipeline.save_pretrained(directory / "model")
    return directory / "model"


def autoencoder(channels: int, **options: Any) -> Any:
    """Images (3, 16, 16) to latents (channels, 8, 8) and back."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def clip_config() -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
        pad_token_id=2 * len(LETTERS) + 1,
    )


def spelling_tokenizer(directory: Path) -> Any:
    """CLIP's tokenizer with the letters for a vocabulary."""
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=TOKENS)
