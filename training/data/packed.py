"""The form that trains fast: all pictures of a split in one memory-mapped uint8 tensor, with their captions."""

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...runtime.errors import FewstepError
from ...runtime.files import atomic_path
from .sources import Source, list_sources, split_files


@dataclass(frozen=True)
class CaptionedImages:
    """N square pictures, kept on disk until they are touched.

    `images` is uint8 of shape (N, 3, H, W); `captions` holds each picture's variants, canonical first; `labels` a
    codepoint or class and `styles` a style, both "" when unknown; `identity` is the SHA-256 of all of it.
    """

    images: torch.Tensor
    captions: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    styles: tuple[str, ...]
    identity: str


def load_captioned_images(path: Path, split: str = "train", size: int | None = None) -> CaptionedImages:
    """Open a built data set, a folder of captioned pictures or a folder of WebDataset shards.

    Pictures are laid on white, cropped to their central square and resized to `size` (default: their own side, when
    they share one). The first load packs them into `PATH/.packed/`, which takes one split's pixels in memory; the later
    ones map that file. A folder that cannot be written is packed in memory each time.

    Raises:
        FewstepError: no such folder or split, no pictures, a picture without a caption or that does not open, or
            pictures of several sizes when `size` is not given.
    """
    files = split_files(path, split)
    prefix = f"{split}-{size or 'native'}-"
    cache = path / ".packed" / f"{prefix}{_listing_key(path, files)}.safetensors"
    with suppress(OSError, SafetensorError):  # absent, unreadable or damaged: pack again
        return _read(cache)
    packed = _pack(list_sources(path, files), size)
    try:
        cache.parent.mkdir(exist_ok=True)
        for stale in cache.parent.glob(f"{prefix}*.safetensors"):
            stale.unlink()
        _write(packed, cache)
        return _read(cache)
    except (OSError, FewstepError):
        return packed


def _listing_key(path: Path, files: list[Path]) -> str:
    stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def _pack(sources: list[Source], size: int | None) -> CaptionedImages:
    side = size or min(_decode(sources[0]).size)
    images = torch.empty(len(sources), 3, side, side, dtype=torch.uint8)

    def fill(position: int) -> None:
        image = _square(_decode(sources[position]))
        if size is None and image.width != side:
            name = sources[position].name
            raise FewstepError(f"the pictures differ in size ({name} is {image.width} pixels, not {side}): give a size")
        pixels = numpy.array(image.resize((side, side), Image.Resampling.LANCZOS))
        images[position] = torch.from_numpy(pixels).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter's lock
        for _ in pool.map(fill, range(len(sources))):
            pass
    captions = tuple(source.captions for source in sources)
    labels = tuple(source.label for source in sources)
    styles = tuple(source.style for source in sources)
    digest = hashlib.sha256(json.dumps([list(images.shape), captions, labels, styles]).encode())
    digest.update(images.numpy().data)
    return CaptionedImages(images, captions, labels, styles, digest.hexdigest())


def _decode(source: Source) -> Image.Image:
    try:
        with Image.open(io.BytesIO(source.read())) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "I;16":  # 16-bit grey, which Pillow would clip at 255
                upright = Image.fromarray((numpy.asarray(upright) >> 8).astype(numpy.uint8))
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            white = Image.new("RGBA", upright.size, "white")
            return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = type(error).__name__
        raise FewstepError(f"{source.name} does not open as a picture ({reason}): replace or remove it") from error


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _write(packed: CaptionedImages, file: Path) -> None:
    names = ("captions", "labels", "styles", "identity")
    with atomic_path(file) as temporary:
        save_file({"images": packed.images}, temporary, {name: json.dumps(getattr(packed, name)) for name in names})
        temporary.chmod(0o644)  # safetensors writes for the owner alone; data folders are shared


def _read(file: Path) -> CaptionedImages:
    with safe_open(file, framework="pt") as archive:
        fields = {key: json.loads(value) for key, value in archive.metadata().items()}
        images = archive.get_tensor("images")
    captions = tuple(tuple(variants) for variants in fields["captions"])
    return CaptionedImages(images, captions, tuple(fields["labels"]), tuple(fields["styles"]), fields["identity"])
