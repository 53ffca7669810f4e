import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from fewstep.runtime.errors import FewstepError
from fewstep.training.data.emoji import Emoji, build_emoji, captions_of, split_of
from fewstep.training.data.emoji_styles import ALL_STYLES, PACKAGES, fetch_packages

pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def built(node_modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "emoji"
    build_emoji(out, size=32, packages=node_modules)
    return out


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]


def all_rows_of(folder: Path) -> list[dict[str, Any]]:
    return rows_of(folder, "train") + rows_of(folder, "validation")


def test_only_the_clean_core_is_built_and_repeated_pictures_are_dropped(built: Path) -> None:
    found = {style: {row["codepoint"] for row in all_rows_of(built) if row["style"] == style} for style in ALL_STYLES}
    core = {"1f680", "2744", "1f34e", "1f6f8", "1f347", "1f980", "1f9c7"}
    # twemoji's flying saucer repeats its rocket
    assert found == {style: core - {"1f6f8"} if style == "twemoji" else core for style in ALL_STYLES}


def test_pictures_are_square_rgb_on_white(built: Path) -> None:
    for file in built.glob("*/*.png"):
        with Image.open(file) as image:
            assert (image.mode, image.size) == ("RGB", (32, 32))
            assert image.getpixel((31, 0)) == (255, 255, 255)
            assert image.getextrema() != ((255, 255),) * 3


def test_an_svg_is_drawn_where_its_view_box_puts_it(built: Path) -> None:
    with Image.open(built / "train" / "fluent-flat-1f680.png") as image:  # the first icon: a red 16x16 square at (0, 0)
        red = numpy.asarray(image)[:, :, 1] < 128
    assert red[:16, :16].all()
    assert red.sum() == 256


def test_no_codepoint_is_in_both_splits(built: Path) -> None:
    train, validation = ({row["codepoint"] for row in rows_of(built, split)} for split in ("train", "validation"))
    assert validation == {"1f980", "1f9c7"}
    assert not train & validation


def test_the_split_never_moves() -> None:
    assert split_of("1f980") == split_of("1f9c7") == "validation"
    assert split_of("1f680") == split_of("2744") == "train"
    held_out = sum(split_of(f"{number:x}") == "validation" for number in range(0x1F300, 0x1FB00))
    assert 0.04 < held_out / 2048 < 0.06


def test_captions_start_with_the_canonical_one(built: Path) -> None:
    row = next(row for row in all_rows_of(built) if row["codepoint"] == "1f680" and row["style"] == "fluent-3d")
    assert row["text"] == "rocket, fluent 3d style"
    assert row["captions"] == [
        "rocket, fluent 3d style",
        "a rocket, fluent 3d style",
        "rocket, launch, fluent 3d style",
        "rocket, space, fluent 3d style",
    ]
    assert (row["group"], row["label"]) == ("travel", "rocket")


@pytest.mark.parametrize(
    ("label", "article"),
    [
        ("apple", "an apple"),
        ("pair of scissors", "a pair of scissors"),
        ("compass", "a compass"),
        ("face with rolling eyes", "a face with rolling eyes"),
        ("grapes", None),
        ("Statue of Liberty", None),
    ],
)
def test_an_article_goes_before_one_thing_only(label: str, article: str | None) -> None:
    captions = captions_of(Emoji("0", label, "objects", ()), "noto")
    assert captions[1:] == ((f"{article}, noto style",) if article else ())


def test_the_description_accounts_for_everything(built: Path, node_modules: Path, tmp_path: Path) -> None:
    description = json.loads((built / "dataset.json").read_text())
    assert description["packages"] == PACKAGES
    assert set(description["styles"]) == set(ALL_STYLES)
    assert description["styles"]["twemoji"]["licence"] == "CC-BY-4.0"
    for split, count in description["counts"].items():
        assert count == len(list((built / split).glob("*.png"))) == len(rows_of(built, split))
    again = build_emoji(tmp_path / "again", size=32, packages=node_modules)
    smaller = build_emoji(tmp_path / "smaller", size=16, packages=node_modules)
    assert again["identity"] == description["identity"] != smaller["identity"]


def test_a_build_replaces_its_own_earlier_one_and_nothing_else(node_modules: Path, tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    build_emoji(out, size=16, packages=node_modules)
    build_emoji(out, size=16, styles=["noto"], packages=node_modules)
    assert {row["style"] for row in all_rows_of(out)} == {"noto"}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear all")
    with pytest.raises(FewstepError, match="is not an earlier build of the emoji data"):
        build_emoji(mine, packages=node_modules)
    assert (mine / "letter.txt").read_text() == "dear all"


def test_a_failed_build_leaves_nothing(node_modules: Path, tmp_path: Path) -> None:
    broken = tmp_path / "node_modules"
    shutil.copytree(node_modules, broken)
    (broken / "emoji-datasource-google" / "img" / "google" / "64" / "1f9c7.png").write_bytes(b"")
    with pytest.raises(FewstepError, match=r"1f9c7\.png does not open as a picture: install the package again"):
        build_emoji(tmp_path / "emoji", styles=["noto"], packages=broken)
    assert [path.name for path in tmp_path.iterdir()] == ["node_modules"]


def test_hugging_face_datasets_opens_it(built: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    opened = datasets.load_dataset("imagefolder", data_dir=str(built), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in opened.items()} == {"train": 19, "validation": 8}
    row = next(row for row in opened["validation"] if row["codepoint"] == "1f980" and row["style"] == "noto")
    assert row["text"] == row["captions"][0] == "crab, noto style"
    with Image.open(built / "validation" / "noto-1f980.png") as image:
        assert (numpy.asarray(row["image"]) == numpy.asarray(image)).all()


def test_an_unknown_style_is_named(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="unknown emoji style apple: choose from fluent-3d"):
        build_emoji(tmp_path / "emoji", styles=["noto", "apple"])


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="has no package emoji-datasource-google, emojibase-data: run npm install"):
        build_emoji(tmp_path / "emoji", styles=["noto"], packages=tmp_path)


def test_a_missing_svg_library_is_named_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(FewstepError, match=r"resvg_py is not installed: pip install \"fewstep\[train\]\""):
        build_emoji(tmp_path / "emoji")


def test_a_missing_npm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FewstepError, match=r"npm is not installed: install Node\.js, or pass --packages"):
        fetch_packages()


def test_npm_installs_once_and_its_failure_is_told(
    node_modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "bin" / "npm"  # stands in for the network: copies the folder, or fails as npm does
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\nwhile [ "$1" != --prefix ]; do shift; done\ncp -r {node_modules} "$2"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    installed = fetch_packages()
    assert (installed / "emojibase-data" / "package.json").is_file()
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\necho 'npm error 404 Not Found - GET it' >&2\nexit 1\n")
    assert fetch_packages() == installed
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with pytest.raises(FewstepError, match="npm could not install the emoji packages: 404 Not Found - GET it"):
        fetch_packages()
    assert not list((tmp_path / "other" / "fewstep").iterdir())
