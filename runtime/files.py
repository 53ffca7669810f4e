"""Atomic writes, hashes and JSON: nothing is ever left half-written."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import FewstepError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that takes no more."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary sibling of `path`; rename it into place on success, remove it on failure.

    Serves files and directories alike: what the block creates at the temporary path appears at `path` whole, or not
    at all.

    Raises:
        FewstepError: the parent folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        if temporary.is_dir() and path.is_dir():
            remove(path)
        temporary.replace(path)
    except OSError as error:
        ours = error.filename is not None and Path(error.filename).parent in (path.parent, path, *path.parents)
        if not ours and error.errno not in FULL:  # who writes into an open file is not told its name
            raise
        raise FewstepError(f"cannot write {path}: {error.strerror}") from error
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds, if it is there; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FewstepError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FewstepError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise FewstepError(f"{path} is not valid JSON ({error}): restore it or make it again") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
