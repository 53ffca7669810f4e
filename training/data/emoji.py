"""Text-to-emoji, the built-in example's data: captioned emoji in four drawing styles, on white."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...runtime.errors import FewstepError, require
from ...runtime.files import read_json
from .emoji_styles import (
    ALL_STYLES,
    LABELS_PACKAGE,
    STYLES,
    Drawing,
    codepoint_of,
    fetch_packages,
    package_versions,
)
from .image_folder import Sample, check_target, write_image_folder

BUILDER = "emoji"
GROUPS = {0: "smileys", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects"}  # emojibase's numbers
HELD_OUT = 0.05  # share of the codepoints


@dataclass(frozen=True)
class Emoji:
    """What emojibase says of one codepoint."""

    codepoint: str
    label: str
    group: str
    tags: tuple[str, ...]


def build_emoji(
    out: Path, size: int = 64, styles: Sequence[str] = ALL_STYLES, packages: Path | None = None
) -> dict[str, Any]:
    """Build the emoji data set (about 1,020 pictures a style) as an image folder and return its description.

    Args:
        out: folder to write; an earlier build there is replaced.
        size: side of the square pictures in pixels; `noto` and `twemoji` are drawn at 64 and enlarged beyond that.
        styles: which of `ALL_STYLES` to include.
        packages: an existing `node_modules` folder with the packages; by default npm installs them into the cache.

    Raises:
        FewstepError: unknown style, `out` holds something else, npm or a package is missing, resvg-py is missing.
    """
    unknown = sorted(set(styles) - set(ALL_STYLES))
    if unknown or not styles:
        raise FewstepError(f"unknown emoji style {', '.join(unknown) or '(none)'}: choose from {', '.join(ALL_STYLES)}")
    if "fluent-flat" in styles:
        require("resvg_py", extra="train")
    check_target(out, BUILDER)  # before npm fetches 234 MB
    packages = packages or fetch_packages()
    versions = package_versions(packages, {LABELS_PACKAGE, *(STYLES[style].package for style in styles)})
    emoji = _read_emoji(packages / LABELS_PACKAGE)
    sources = {style: {"licence": STYLES[style].licence, "credit": STYLES[style].credit} for style in styles}
    description = {"size": size, "styles": sources, "packages": versions}
    samples = (sample for style in styles for sample in _samples(style, emoji, packages, size))
    return write_image_folder(out, BUILDER, samples, description)


def split_of(codepoint: str) -> str:
    """`validation` for about 5% of the codepoints, decided by the codepoint alone, so all styles and sizes agree."""
    draw = int.from_bytes(hashlib.sha256(codepoint.encode()).digest()[:8]) / 2**64
    return "validation" if draw < HELD_OUT else "train"


def captions_of(emoji: Emoji, style: str) -> tuple[str, ...]:
    """Caption variants, canonical `label, style` first; an article where the label is a singular thing; two by tags."""
    words = STYLES[style].words
    captions = [f"{emoji.label}, {words}"]
    head = re.split(r" (?:with|without|in|of|on|over|and|holding|showing|behind) ", emoji.label)[0]
    if emoji.label.islower() and (head.endswith("ss") or not head.endswith("s")):
        article = "an" if head[0] in "aeiou" else "a"
        captions.append(f"{article} {emoji.label}, {words}")
    fresh = [tag for tag in emoji.tags if tag.lower() not in emoji.label.lower()]
    captions.extend(f"{emoji.label}, {tag}, {words}" for tag in fresh[:2])
    return tuple(captions)


def _read_emoji(package: Path) -> dict[str, Emoji]:
    entries = (entry for entry in read_json(package / "en" / "data.json") if entry.get("group") in GROUPS)
    emoji = (
        Emoji(codepoint_of(entry["hexcode"]), entry["label"], GROUPS[entry["group"]], tuple(entry.get("tags", ())))
        for entry in entries
    )
    return {one.codepoint: one for one in emoji}


def _samples(style: str, emoji: dict[str, Emoji], packages: Path, size: int) -> Iterator[Sample]:
    drawings: dict[str, Drawing] = dict(STYLES[style].drawings(packages / STYLES[style].package))
    seen: set[bytes] = set()
    for codepoint in sorted(drawings.keys() & emoji.keys()):
        image = _on_white(drawings[codepoint](size), size)
        pixels = image.tobytes()
        if pixels in seen:  # a style may draw two codepoints alike; both captions on one picture would only confuse
            continue
        seen.add(pixels)
        one = emoji[codepoint]
        fields = {
            "captions": captions_of(one, style),
            "codepoint": codepoint,
            "style": style,
            "group": one.group,
            "label": one.label,
        }
        yield Sample(split_of(codepoint), f"{style}-{codepoint}", image, fields)


def _on_white(drawing: Image.Image, size: int) -> Image.Image:
    side = max(drawing.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
