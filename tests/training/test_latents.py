"""Latents are made once for the same pictures and encoder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.runtime.denoiser import Denoiser
from fewstep.runtime.families import Model
from fewstep.runtime.schedule import Flow
from fewstep.training.data.packed import CaptionedImages
from fewstep.training.latents import cache_latents, decode_latents, encode_images, load_latent_data

CPU = torch.device("cpu")


class Counted(nn.Module):
    """An encoder that counts the images it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 4, stride=4)
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        latents: Tensor = self.convolution(images)
        return latents


@pytest.fixture
def pictures() -> CaptionedImages:
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    return CaptionedImages(images, (("a",),) * 5, ("",) * 5, ("",) * 5, "first")


def test_the_second_reading_encodes_nothing(pictures: CaptionedImages, tmp_path: Path) -> None:
    encoder = Counted()
    expected = encode_images(encoder, pictures.images, CPU)
    made, read = (cache_latents(encoder, pictures, tmp_path, CPU) for _ in range(2))
    assert torch.equal(made, expected)
    assert torch.equal(read, expected)
    assert encoder.seen == 10


def test_other_pictures_or_weights_are_encoded_anew(pictures: CaptionedImages, tmp_path: Path) -> None:
    encoder = Counted()
    first = cache_latents(encoder, pictures, tmp_path, CPU)
    other = replace(pictures, images=255 - pictures.images, identity="second")
    assert not torch.equal(cache_latents(encoder, other, tmp_path, CPU), first)
    with torch.no_grad():
        encoder.convolution.bias.add_(1)
    torch.testing.assert_close(cache_latents(encoder, pictures, tmp_path, CPU), first + 1)


def test_latents_are_decoded_in_pieces() -> None:
    sizes: list[int] = []

    class Decoder(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            sizes.append(len(latents))
            return latents.repeat_interleave(2, -1)

    latents = torch.randn(130, 3, 4, 4)
    assert torch.equal(decode_latents(Decoder(), latents, CPU), latents.repeat_interleave(2, -1))
    assert sizes == [64, 64, 2]


class Lengths:
    """A text encoder that counts the prompts it has seen."""

    identity = "lengths"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.seen += prompts
        return {"letters": torch.tensor([[len(prompt)] for prompt in prompts])}


def test_the_empty_prompt_is_cached_with_the_captions(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for colour in ("red", "green"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "train" / f"{colour}.png")
        (tmp_path / "train" / f"{colour}.txt").write_text(colour)
    prompts = Lengths()
    network = nn.Identity()
    model = Model(network, Denoiser(network, Flow(), "flow_prediction"), Counted(), network, (4, 2, 2), lambda: prompts)
    for _ in range(2):
        data = load_latent_data(tmp_path, model, 2, 0, CPU)
        assert data.negative["letters"].tolist() == [[0]]
        assert sorted(data.batches(0, 0).condition["letters"].flatten().tolist()) == [3, 5]
    assert sorted(prompts.seen) == ["", "green", "red"]
