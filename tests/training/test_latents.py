"""Latents are made once for the same pictures and encoder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.training.data.packed import CaptionedImages
from fewstep.training.latents import cache_latents, encode_images

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
