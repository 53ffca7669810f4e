"""Sizes of the networks that are distilled here: the one table from which every benchmark takes its shapes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Transformer:
    """A denoiser that is a transformer.

    Args:
        hidden: channels of a token.
        heads: of attention; the channels of a head are `hidden / heads`.
        inner: channels inside the feed-forward layer.
        latent: channels of the latent.
        tokens: of an image, by its side in pixels, smallest first.
        text: tokens that attention sees beside those of the image; 0 where they are apart.
    """

    hidden: int
    heads: int
    inner: int
    latent: int
    tokens: Mapping[int, int]
    text: int = 0

    @property
    def head(self) -> int:
        """Channels of an attention head."""
        return self.hidden // self.heads


@dataclass(frozen=True)
class Level:
    """One resolution of a convolutional network.

    Args:
        channels: of the feature map.
        side: of the feature map.
        heads: of the attention in its transformer blocks; 0: it has none.
    """

    channels: int
    side: int
    heads: int = 0


@dataclass(frozen=True)
class UNet:
    """A convolutional denoiser, at the size of image that it was made for.

    Args:
        pixels: side of that image.
        latent: channels of the latent, which has the side of the first level.
        levels: finest first.
    """

    pixels: int
    latent: int
    levels: tuple[Level, ...]

    def attending(self) -> Iterator[Level]:
        """The levels with transformer blocks."""
        return (level for level in self.levels if level.heads)


@dataclass(frozen=True)
class Shapes:
    """All networks by name, and the decoder that those with KL latents share."""

    transformers: Mapping[str, Transformer]
    unets: Mapping[str, UNet]
    decoder: tuple[Level, ...]

    def tokens(self) -> Iterator[tuple[str, str, int, int, Transformer]]:
        """Name, words, batch, tokens and network: the largest image alone for each network, then four of the smallest.

        One image alone is what a student is asked for; four are what a training step takes.
        """
        for batch, choose in ((1, max), (4, min)):
            for name, network in self.transformers.items():
                pixels = choose(network.tokens)
                yield name, f"{pixels} px, batch {batch}", batch, network.tokens[pixels], network


FULL = Shapes(
    transformers={
        # arXiv 2410.10629 (1.6B), arXiv 2403.03206 (medium), and FLUX.1.
        "Sana": Transformer(2240, 70, 5600, 32, {512: 256, 1024: 1024}),
        "SD3.5": Transformer(1536, 24, 6144, 16, {512: 1024, 1024: 4096}, text=333),
        "Flux": Transformer(3072, 24, 12288, 16, {512: 1024, 1024: 4096}, text=512),
        "built-in": Transformer(256, 8, 640, 16, {64: 64}),
    },
    unets={
        # arXiv 2307.01952 and arXiv 2112.10752.
        "SDXL": UNet(1024, 4, (Level(320, 128), Level(640, 64, 10), Level(1280, 32, 20))),
        "SD1.5": UNet(512, 4, (Level(320, 64, 8), Level(640, 32, 8), Level(1280, 16, 8), Level(1280, 8))),
    },
    decoder=(Level(512, 128), Level(512, 256), Level(256, 512), Level(128, 1024)),
)
"""What is distilled; the decoder is at 1024 pixels."""
