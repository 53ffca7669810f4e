"""The five npm packages of the emoji data set and how each style's pictures are read from them."""

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ...runtime.errors import FewstepError, require
from ...runtime.files import atomic_path, read_json

LABELS_PACKAGE = "emojibase-data"
PACKAGES = {
    LABELS_PACKAGE: "17.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
}

Drawing = Callable[[int], Image.Image]  # side wanted -> RGBA picture, finer than that where the source can be


@dataclass(frozen=True)
class Style:
    """One drawing style: the words captions name it by, the package that holds it, and its terms."""

    words: str
    package: str
    licence: str
    credit: str
    drawings: Callable[[Path], Iterator[tuple[str, Drawing]]]  # folder of the package -> (codepoint, drawing)


def codepoint_of(name: str) -> str:
    """The codepoint sequence in lower case, without the presentation selector fe0f that packages place differently."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def fetch_packages() -> Path:
    """Install the pinned packages with npm into the user's cache, once, and return their `node_modules` folder.

    Raises:
        FewstepError: npm is missing or fails.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep" / "emoji-packages"
    if all(_version(cache / "node_modules", name) == version for name, version in PACKAGES.items()):
        return cache / "node_modules"
    with atomic_path(cache) as folder:
        folder.mkdir()
        _npm_install(folder)
    return cache / "node_modules"


def _npm_install(folder: Path) -> None:
    options = [
        "--ignore-scripts",
        "--omit=peer",
        "--no-audit",
        "--no-fund",
        "--loglevel=error",
        "--prefix",
        str(folder),
    ]
    pinned = [f"{name}@{version}" for name, version in PACKAGES.items()]
    try:
        subprocess.run(["npm", "install", *options, *pinned], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FewstepError(
            "npm is not installed: install Node.js, or pass --packages with a node_modules folder"
        ) from error
    except subprocess.CalledProcessError as error:
        lines = [line.removeprefix("npm error ") for line in error.stderr.splitlines()]
        reason = next((line for line in lines if len(line.split()) > 2), "it gave no reason")  # codes come first
        raise FewstepError(f"npm could not install the emoji packages: {reason}") from error


def package_versions(packages: Path, names: set[str]) -> dict[str, str]:
    """The versions of the named packages in a `node_modules` folder.

    Raises:
        FewstepError: a package is not there.
    """
    versions = {name: _version(packages, name) for name in sorted(names)}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        raise FewstepError(f"{packages} has no package {', '.join(missing)}: run npm install {' '.join(missing)} there")
    return {name: version for name, version in versions.items() if version is not None}


def _version(packages: Path, name: str) -> str | None:
    manifest = packages / name / "package.json"
    return str(read_json(manifest)["version"]) if manifest.is_file() else None


def _raster(folder: str) -> Callable[[Path], Iterator[tuple[str, Drawing]]]:
    def drawings(package: Path) -> Iterator[tuple[str, Drawing]]:
        for file in sorted((package / folder).iterdir()):
            yield codepoint_of(file.stem), partial(_open, file)

    return drawings


def _open(file: Path, _size: int) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGBA")
    except OSError as error:
        raise FewstepError(f"{file} does not open as a picture: install the package again") from error


def _iconify(package: Path) -> Iterator[tuple[str, Drawing]]:
    collection = read_json(package / "icons.json")
    names = read_json(package / "chars.json")
    for codepoint, name in names.items():
        if icon := collection["icons"].get(name):
            yield codepoint_of(codepoint), partial(_rasterise, _svg(icon, collection))


def _svg(icon: dict[str, Any], collection: dict[str, Any]) -> str:
    width, height = (icon.get(side, collection[side]) for side in ("width", "height"))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def _rasterise(svg: str, size: int) -> Image.Image:
    png: bytes = require("resvg_py", extra="train").svg_to_bytes(svg_string=svg, width=4 * size, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")


STYLES = {
    "fluent-3d": Style(
        "fluent 3d style", "@lobehub/fluent-emoji-3d", "MIT", "Fluent Emoji by Microsoft", _raster("assets")
    ),
    "fluent-flat": Style(
        "fluent flat style", "@iconify-json/fluent-emoji-flat", "MIT", "Fluent Emoji by Microsoft", _iconify
    ),
    "noto": Style(
        "noto style", "emoji-datasource-google", "Apache-2.0", "Noto Emoji by Google", _raster("img/google/64")
    ),
    "twemoji": Style(
        "twemoji style",
        "emoji-datasource-twitter",
        "CC-BY-4.0",
        "Twemoji by Twitter, Inc and other contributors",
        _raster("img/twitter/64"),
    ),
}
ALL_STYLES = tuple(STYLES)
