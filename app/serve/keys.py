"""API keys: random, kept as SHA-256 hashes, compared in constant time."""

import hashlib
import hmac
import ipaddress
import re
import secrets
from pathlib import Path

from ...runtime.errors import FewstepError
from ...runtime.files import atomic_path

PREFIX = "fs-"
LINE = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64})\s+(?P<hash>[0-9a-f]{64})")


class Keys:
    """Names by the hashes of their keys; empty lets everybody in."""

    def __init__(self, names: dict[str, str] | None = None) -> None:
        self._names = names or {}

    def __bool__(self) -> bool:
        return bool(self._names)

    @classmethod
    def read(cls, file: Path) -> "Keys":
        """Read a file with a name and a hash a line.

        Raises:
            FewstepError: it cannot be read, holds none or something else.
        """
        try:
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise FewstepError(
                f"cannot read {file}: {error.strerror}; `fewstep key NAME --file {file}` makes it"
            ) from error
        found = [LINE.fullmatch(line.strip()) for line in lines]
        if not all(found) or not found:
            raise FewstepError(f"{file} is no list of keys: each line is a name and a hash, as `fewstep key` writes it")
        return cls({match["hash"]: match["name"] for match in found if match})

    def owner(self, key: str) -> str | None:
        """Whose key it is; every hash is compared, so that time tells nothing."""
        mine, owner = _hash(key), None
        for known, name in self._names.items():
            if hmac.compare_digest(known, mine):
                owner = name
        return owner


def new_key(name: str, file: Path) -> str:
    """Add a key to a file, which gets its hash only.

    Raises:
        FewstepError: the name cannot stand in the file, or the file cannot be written.
    """
    line = f"{name} {'0' * 64}"
    if not LINE.fullmatch(line):
        raise FewstepError(f"{name!r} is no name for a key: use letters, digits, dots, dashes and underscores")
    key = PREFIX + secrets.token_urlsafe(32)
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    before += "\n" if before and not before.endswith("\n") else ""
    with atomic_path(file) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(f"{before}{name} {_hash(key)}\n", encoding="utf-8")
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
