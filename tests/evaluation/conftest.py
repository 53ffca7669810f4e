"""Tiny captioned data, and the feature network loaded once."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.training.data.packed import CaptionedImages
from fewstep.training.evaluation.features import FeatureNetwork
from fewstep.training.evaluation.reference import Reference, load_reference
from fewstep.training.evaluation.split import Split

SIDE = 16
SHAPES, STYLES = 10, ("outline", "solid")


@pytest.fixture(scope="session")
def network() -> FeatureNetwork:
    return FeatureNetwork()


@pytest.fixture(scope="session")
def data() -> CaptionedImages:
    """Ten random blocks of colour on white, each in two styles."""
    generator = torch.Generator().manual_seed(1)
    images = torch.full((SHAPES * len(STYLES), 3, SIDE, SIDE), 255, dtype=torch.uint8)
    for shape in range(SHAPES):
        colours = torch.randint(0, 256, (3, 4, 4), generator=generator, dtype=torch.uint8)
        block = colours.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
        images[2 * shape, :, 2:14, 2:14] = block
        images[2 * shape, :, 4:12, 4:12] = 255
        images[2 * shape + 1, :, 2:14, 2:14] = block
    labels = tuple(f"shape {shape}" for shape in range(SHAPES) for _ in STYLES)
    styles = STYLES * SHAPES
    captions = tuple((f"{label}, {style}", f"a {label}") for label, style in zip(labels, styles, strict=True))
    identity = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return CaptionedImages(images, captions, labels, styles, identity)


@pytest.fixture(scope="session")
def reference(data: CaptionedImages, network: FeatureNetwork, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference(data, network, tmp_path_factory.mktemp("reference") / "features.safetensors")


@pytest.fixture(scope="session")
def split(data: CaptionedImages, reference: Reference) -> Split:
    """The data as the training split, which is its own gallery."""
    return Split("train", data, reference, reference)


@pytest.fixture
def folder(data: CaptionedImages, tmp_path: Path) -> Path:
    """The tiny data as a folder of pictures: the last four shapes, in two styles each, are held out."""
    for position, image in enumerate(data.images):
        part = tmp_path / "data" / ("train" if position < 12 else "validation")
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(part / f"{position:02}.png")
        row = {"file_name": f"{position:02}.png", "text": data.captions[position][0], "label": data.labels[position]}
        with (part / "metadata.jsonl").open("a") as metadata:
            metadata.write(json.dumps({**row, "style": data.styles[position]}) + "\n")
    return tmp_path / "data"
