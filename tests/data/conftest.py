"""A `node_modules` folder in the five packages' real layout, with a handful of emoji."""

import json
from pathlib import Path

import pytest
from PIL import Image

EMOJI = [  # hexcode, label, tags, emojibase group
    ("1F680", "rocket", ["launch", "space", "rocket ship"], 5),
    ("2744", "snowflake", ["cold"], 5),
    ("1F34E", "red apple", [], 4),
    ("1F6F8", "flying saucer", ["ufo"], 5),
    ("1F347", "grapes", ["fruit"], 4),
    ("1F980", "crab", ["seafood"], 3),
    ("1F9C7", "waffle", ["breakfast"], 4),
    ("1F44B", "waving hand", ["hello"], 1),
    ("1F3FB", "light skin tone", [], 2),
]
FILE_NAMES = [hexcode.lower() for hexcode, *_ in EMOJI if hexcode != "2744"] + ["2744-fe0f", "1f44b-1f3fb"]
VERSIONS = {
    "emojibase-data": "17.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
}


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("npm") / "node_modules"
    for name, version in VERSIONS.items():
        _write_json(root / name / "package.json", {"name": name, "version": version})
    entries = [{"hexcode": code, "label": label, "tags": tags, "group": group} for code, label, tags, group in EMOJI]
    regional = {"hexcode": "1F1E6", "label": "regional indicator A"}  # has no group
    _write_json(root / "emojibase-data/en/data.json", [*entries, regional])
    for position, name in enumerate(FILE_NAMES):
        _write_picture(root / f"@lobehub/fluent-emoji-3d/assets/{name}.webp", 256, position)
        _write_picture(root / f"emoji-datasource-google/img/google/64/{name}.png", 64, position)
        # the flying saucer repeats the rocket's picture in this style
        twin = FILE_NAMES.index("1f680") if name == "1f6f8" else position
        _write_picture(root / f"emoji-datasource-twitter/img/twitter/64/{name}.png", 64, twin)
    body = '<path fill="#ff0000" d="M{0} {0}h16v16H{0}z"/>'
    icons = {f"icon-{name}": {"body": body.format(position)} for position, name in enumerate(FILE_NAMES)}
    package = root / "@iconify-json/fluent-emoji-flat"
    _write_json(package / "icons.json", {"icons": icons, "width": 32, "height": 32})
    _write_json(
        package / "chars.json", {name: f"icon-{name}" for name in FILE_NAMES} | {"1f1e6": "icon-that-is-absent"}
    )
    return root


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _write_picture(path: Path, side: int, position: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    colour = (20 * position, 255 - 20 * position, 128, 255)
    image.paste(colour, (side // 4, side // 4, side // 2, side // 2 + position))
    image.save(path)
