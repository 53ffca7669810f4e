"""Fashion-MNIST from Debian's package: small grey clothes for quick class-conditional runs."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, ImageOps

from ...runtime.errors import FewstepError
from .image_folder import Sample, write_image_folder

BUILDER = "fashion"
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
SIDE = 28
CLASSES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SPLITS = {"train": "train", "validation": "t10k"}  # the official test pictures validate


def build_fashion(out: Path, size: int = 32, source: Path | None = None) -> dict[str, Any]:
    """Build Fashion-MNIST (60,000 + 10,000 pictures) as an image folder, RGB on black, and return its description.

    Args:
        out: folder to write; an earlier build there is replaced.
        size: side of the pictures in pixels; 28x28 is padded to 32x32 and resized from there.
        source: folder with the four `.gz` files, by default where Debian's package puts them.

    Raises:
        FewstepError: the package is not installed, a file of it is damaged, or `out` holds something else.
    """
    description = {"size": size, "package": PACKAGE, "licence": "MIT", "credit": "Fashion-MNIST by Zalando SE"}
    return write_image_folder(out, BUILDER, _samples(source or INSTALLED, size), description)


def _samples(folder: Path, size: int) -> Iterator[Sample]:
    for split, prefix in SPLITS.items():
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz").reshape(-1, SIDE, SIDE)
        classes = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        for position, (pixels, number) in enumerate(zip(images, classes, strict=True)):
            image = ImageOps.expand(Image.fromarray(pixels), 2, fill=0).convert("RGB")
            image = image.resize((size, size), Image.Resampling.LANCZOS)
            name = CLASSES[number]
            yield Sample(split, f"{position:05}", image, {"captions": [name], "label": name, "style": "fashion"})


def _read_idx(file: Path) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
    try:
        content = gzip.decompress(file.read_bytes())
    except FileNotFoundError as error:
        raise FewstepError(f"{file} is missing: run apt-get install {PACKAGE}, or name the folder it is in") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise FewstepError(f"{file} is damaged: reinstall {PACKAGE}") from error
    header = 4 + 4 * content[3]  # magic number, whose last byte counts the dimensions, then one length each
    return numpy.frombuffer(content, numpy.uint8, offset=header)
