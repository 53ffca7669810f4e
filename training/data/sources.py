"""Lists the captioned pictures of a folder (metadata file or caption files) or of WebDataset shards."""

import csv
import io
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import FewstepError

SPLITS = ("train", "validation", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Source:
    """One captioned picture: a whole file, or `length` bytes from `offset` in a shard."""

    name: str
    file: Path
    captions: tuple[str, ...]
    label: str
    style: str
    offset: int = 0
    length: int = -1

    def read(self) -> bytes:
        """The encoded picture."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


def split_files(path: Path, split: str) -> list[Path]:
    """The files of a split, sorted: of its subfolder, or of the shards named after it, or all when nothing is split.

    Raises:
        FewstepError: the folder or the split does not exist.
    """
    if not path.is_dir():
        raise FewstepError(f"there is no folder {path}: build the data first or correct the path")
    folders = [name for name in SPLITS if (path / name).is_dir()]
    shards = [name for name in SPLITS if any(path.glob(f"{name}*.tar"))]
    available = folders or shards or ["train"]
    if split not in available:
        raise FewstepError(f'{path} has no split "{split}": choose from {", ".join(available)}')
    if folders:
        return _visible_files(path / split)
    return sorted(path.glob(f"{split}*.tar")) if shards else _visible_files(path)


def list_sources(folder: Path, files: list[Path]) -> list[Source]:
    """The captioned pictures among `files`, sorted by name.

    Raises:
        FewstepError: no pictures, or a picture without a caption.
    """
    shards = [file for file in files if file.suffix == ".tar"]
    sources = [source for shard in shards for source in _shard_sources(shard)] if shards else _folder_sources(files)
    if not sources:
        raise FewstepError(f"{folder} holds no pictures: expected {', '.join(IMAGE_SUFFIXES)} files or .tar shards")
    silent = [source.name for source in sources if not source.captions]
    if silent:
        raise FewstepError(
            f"{len(silent)} of {len(sources)} pictures in {folder} have no caption, {silent[0]} for one: "
            f"name it in a metadata.jsonl or put its caption beside it in a .txt file"
        )
    return sources


def _visible_files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files.extend(Path(parent, name) for name in names if not name.startswith("."))
    return sorted(files)


def _folder_sources(files: list[Path]) -> list[Source]:
    rows: dict[Path, dict[str, Any]] = {}
    for file in files:
        if file.name in METADATA_FILES:
            rows.update(_metadata_rows(file))
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    absent = sorted(rows.keys() - set(images))
    if absent:
        raise FewstepError(
            f"a metadata file names {absent[0]}, which is no picture there: remove its row or restore it"
        )
    return [_source(str(image), image, rows.get(image) or _caption_file(image)) for image in images]


def _metadata_rows(file: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".csv":
            rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        for row in rows:
            yield file.parent / row["file_name"], row
    except (ValueError, KeyError, TypeError) as error:
        raise FewstepError(f"{file} is not a table with a file_name in each row: {error!r}") from error


def _caption_file(image: Path) -> dict[str, Any]:
    file = image.with_suffix(".txt")
    try:
        return {"text": file.read_text(encoding="utf-8")} if file.is_file() else {}
    except ValueError as error:
        raise FewstepError(f"{file} is not UTF-8 text: save it again as UTF-8") from error


def _shard_sources(shard: Path) -> Iterator[Source]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                directory, _, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                if member.isfile():
                    samples[f"{directory}/{key}"][f".{extension.lower()}"] = member
            for members in samples.values():
                image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
                if image:
                    fields = _shard_fields(archive, members)
                    yield _source(f"{shard}:{image.name}", shard, fields, image.offset_data, image.size)
    except (tarfile.TarError, ValueError, TypeError) as error:
        raise FewstepError(f"{shard} is not a readable WebDataset shard: {error}") from error


def _shard_fields(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if ".json" in members:
        fields.update(json.loads(_content(archive, members[".json"])))
    if ".txt" in members:
        fields["text"] = _content(archive, members[".txt"]).decode()
    return fields


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # only regular files are collected
    return file.read()


def _source(name: str, file: Path, fields: dict[str, Any], offset: int = 0, length: int = -1) -> Source:
    variants = fields.get("captions")
    if not isinstance(variants, list):
        variants = [_first(fields, "text", "caption")]
    captions = tuple(str(variant).strip() for variant in variants if str(variant).strip())
    return Source(name, file, captions, _first(fields, "codepoint", "label"), _first(fields, "style"), offset, length)


def _first(fields: dict[str, Any], *names: str) -> str:
    return next((str(fields[name]) for name in names if fields.get(name) not in (None, "")), "")
