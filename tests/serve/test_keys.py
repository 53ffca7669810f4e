"""API keys: who has none is not served, and the file holds no key."""

import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.app.serve.keys import Keys, is_loopback, new_key
from fewstep.runtime.errors import FewstepError

from .conftest import start_server

httpx = pytest.importorskip("httpx")
websockets = pytest.importorskip("websockets.sync.client")


def test_a_key_opens_and_its_file_gives_it_away_to_nobody(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    key, other = new_key("ann", file), new_key("ben", file)
    assert (file.stat().st_mode & 0o777, len(file.read_text().splitlines())) == (0o600, 2)
    assert key not in file.read_text()
    file.write_text(file.read_text().rstrip("\n"))  # as an editor may leave it
    new_key("cid", file)
    keys = Keys.read(file)
    assert (keys.owner(key), keys.owner(other), keys.owner(key + "x"), keys.owner("")) == ("ann", "ben", None, None)


@pytest.mark.parametrize("content", ["", "ann", "ann 12", f"a/b {'0' * 64}", "\x00"])
def test_a_file_that_is_no_list_of_keys_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys.txt").write_text(content)
    with pytest.raises(FewstepError, match="is no list of keys"):
        Keys.read(tmp_path / "keys.txt")


def test_a_name_that_cannot_stand_in_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="is no name for a key"):
        new_key("ann\nben", tmp_path / "keys.txt")
    assert not (tmp_path / "keys.txt").exists()


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("example", False)],
)
def test_addresses_that_others_reach(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_a_server_with_keys_asks_for_them(models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    command = [
        sys.executable,
        "-P",
        "-c",
        "from fewstep.app.cli import main; main()",
        "key",
        "ann",
        "--file",
        str(file),
    ]
    key = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    server = start_server(tmp_path / "log", models["quick"], "--host", "0.0.0.0", "--keys", file)
    url = server.url.replace("0.0.0.0", "127.0.0.1")
    body = {"prompt": "a square"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {key}"}):
        answer = httpx.post(f"{url}/v1/images/generations", json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401
    endless = httpx.post(f"{url}/v1/images/edits", content=iter(lambda: b"0" * 1000, b""), timeout=60)
    assert endless.status_code == 401  # before a body is read
    live = url.replace("http", "ws") + "/v1/images/live"
    with pytest.raises(websockets.InvalidStatus, match="403"), websockets.connect(live):
        pass
    with websockets.connect(live, subprotocols=["fewstep", f"key.{key}"]) as socket:
        socket.send('{"prompt": "a square"}')
        assert '"b64_json"' in socket.recv(30)
    known = {"Authorization": f"Bearer {key}"}
    assert httpx.post(f"{url}/v1/images/generations", json=body, headers=known, timeout=60).status_code == 200
    assert httpx.get(f"{url}/health").status_code == 200
    server.stop()
    assert key not in server.log.read_text()
