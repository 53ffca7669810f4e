"""Atomic writes: whole, or not at all, and in a sentence."""

from pathlib import Path

import pytest

from fewstep.runtime.errors import FewstepError
from fewstep.runtime.files import atomic_path

FULL_DISK = Path("/dev/full")


@pytest.mark.skipif(not FULL_DISK.exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_said_in_a_sentence_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"before")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.symlink_to(FULL_DISK)
            temporary.write_bytes(b"after")

    with pytest.raises(FewstepError, match=r"cannot write .*picture\.png: No space left"):
        write()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), atomic_path(tmp_path / "a"):
        raise ConnectionResetError("by a peer")
    assert not list(tmp_path.iterdir())
