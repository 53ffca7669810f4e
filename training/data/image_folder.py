"""Writes a data set as a Hugging Face image folder, whole or not at all."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...runtime.errors import FewstepError
from ...runtime.files import atomic_path, read_json, write_json

DESCRIPTION = "dataset.json"


@dataclass(frozen=True)
class Sample:
    """One captioned RGB picture and the fields of its metadata row, among them `captions`, canonical first."""

    split: str
    name: str
    image: Image.Image
    fields: dict[str, Any]


def check_target(out: Path, builder: str) -> None:
    """Refuse to replace anything but an earlier build by the same builder.

    Raises:
        FewstepError: `out` holds something else.
    """
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    ours = (out / DESCRIPTION).is_file() and read_json(out / DESCRIPTION).get("builder") == builder
    if not empty and not ours:
        raise FewstepError(f"{out} exists and is not an earlier build of the {builder} data: choose another folder")


def write_image_folder(
    out: Path, builder: str, samples: Iterable[Sample], description: dict[str, Any]
) -> dict[str, Any]:
    """Write `OUT/<split>/*.png`, `OUT/<split>/metadata.jsonl` and `OUT/dataset.json`; return what the last one says.

    The description gains the counts of each split and `identity`, the SHA-256 of every row with its pixels.
    """
    check_target(out, builder)
    digest = hashlib.sha256()
    rows: dict[str, list[str]] = defaultdict(list)
    with atomic_path(out) as folder:
        folder.mkdir()
        for sample in samples:
            (folder / sample.split).mkdir(exist_ok=True)
            sample.image.save(folder / sample.split / f"{sample.name}.png")
            row = {"file_name": f"{sample.name}.png", "text": sample.fields["captions"][0], **sample.fields}
            line = json.dumps(row, ensure_ascii=False) + "\n"
            digest.update(line.encode() + sample.image.tobytes())
            rows[sample.split].append(line)
        for split, lines in rows.items():
            (folder / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        counts = {split: len(lines) for split, lines in rows.items()}
        summary = {"builder": builder, **description, "counts": counts, "identity": digest.hexdigest()}
        write_json(folder / DESCRIPTION, summary)
    return summary
