"""`fewstep serve --ray`: one cluster for all tests here, on this machine, with tiny models."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.serve", exc_type=ImportError)
httpx = pytest.importorskip("httpx")
websockets = pytest.importorskip("websockets.sync.client")
PATH = "/v1/images/generations"
COMMAND = [sys.executable, "-P", "-c", "from fewstep.app.cli import main; main()", "serve", "--ray"]
SETTINGS = """
port = {port}
wait = 60
[models.quick]
path = "{quick}"
engine = "torch"
threads = 1
[models.teacher]
path = "{teacher}"
engine = "torch"
threads = 1
[replicas]
most = 2
cpus = 0.1
requests = 2.0
grow_seconds = 0.5
shrink_seconds = 2.0
"""


@dataclass
class Cluster:
    """A running `fewstep serve --ray`: its process, where it listens, and the folder that Ray's processes name."""

    process: subprocess.Popen[bytes]
    url: str
    folder: str
    log: Path

    def processes(self, title: str = "") -> list[int]:
        """Of Ray: all, or those with a title."""
        raylets = {pid for pid, words in running().items() if self.folder in words}
        children = {pid for pid in running() if parent(pid) in raylets}
        return [pid for pid in raylets | children if title in running().get(pid, "")]

    def replicas(self) -> list[int]:
        """That draw."""
        return sorted(self.processes("ServeReplica:fewstep:Models"))

    def ask(self, **body: Any) -> Any:
        """A request for images."""
        return httpx.post(self.url + PATH, json={"prompt": "a square", **body}, timeout=120)


def running() -> dict[int, str]:
    """Command lines by process."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(file.parent.name)] = file.read_text(errors="replace")
        except OSError:
            continue
    return found


def parent(process: int) -> int:
    try:
        found = re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def until(happened: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="ray")  # sockets lie in it: their paths must be short
    port, home = free_port(), tmp_path_factory.mktemp("cluster")
    (home / "ray.toml").write_text(SETTINGS.format(port=port, **models))
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, str(home / "ray.toml")],
            stdout=log,
            stderr=log,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": folder, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            | {"RAY_memory_monitor_refresh_ms": "0"},
        )
    cluster = Cluster(process, f"http://127.0.0.1:{port}", folder, home / "log")
    try:
        until(lambda: process.poll() is not None or "fewstep serves" in cluster.log.read_text(), 180)
        assert process.poll() is None, cluster.log.read_text()
        yield cluster
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(90)
        for left in cluster.processes():
            os.kill(left, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def test_it_is_the_same_application(cluster: Cluster) -> None:
    assert [entry["id"] for entry in httpx.get(cluster.url + "/v1/models").json()["data"]] == ["quick", "teacher"]
    assert httpx.get(cluster.url + "/ready").json() == {"status": "ready"}
    answer = cluster.ask(seed=1, n=2).json()
    assert [data["seed"] for data in answer["data"]] == [1, 2]
    refused = cluster.ask(size="1x1")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_size")
    assert cluster.ask(model="none").status_code == 404
    stranger = httpx.get(cluster.url + "/v1/models", headers={"Host": "elsewhere.example"})
    assert stranger.status_code == 400


def test_previews_stream(cluster: Cluster) -> None:
    body = {"prompt": "a square", "model": "teacher", "num_inference_steps": 4, "seed": 2, "stream": True}
    names = []
    with httpx.stream("POST", cluster.url + PATH, json=body | {"partial_images": 2}, timeout=60) as lines:
        for line in lines.iter_lines():
            if line.startswith("event: "):
                names.append(line.rpartition(".")[2])
            elif line.startswith("data: "):
                last = json.loads(line.removeprefix("data: "))
    assert names == ["partial_image", "partial_image", "completed"]
    plain = cluster.ask(model="teacher", num_inference_steps=4, seed=2).json()
    assert last["b64_json"] == plain["data"][0]["b64_json"]


def test_a_websocket_is_answered(cluster: Cluster) -> None:
    with websockets.connect(cluster.url.replace("http", "ws") + "/v1/images/live") as connection:
        for number in (1, 2):
            connection.send(json.dumps({"prompt": "a square", "seed": number, "id": number}))
            answer = json.loads(connection.recv(30))
            assert (answer["id"], answer["seed"]) == (number, number)


def test_a_client_that_leaves_frees_its_place(cluster: Cluster) -> None:
    """A hundred steps of sixteen images, several times, would take minutes."""
    for _ in range(8):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                cluster.url + PATH,
                json={"prompt": "a", "model": "teacher", "n": 16, "num_inference_steps": 100},
                timeout=0.3,
            )
    begin = time.monotonic()
    assert cluster.ask(model="teacher", num_inference_steps=1).status_code == 200
    assert time.monotonic() - begin < 60


def test_replicas_come_when_there_is_work_draw_the_same_and_one_may_die(cluster: Cluster) -> None:
    before = cluster.ask(seed=5).json()["data"][0]["b64_json"]
    done, answers = threading.Event(), list[Any]()

    def keep_asking() -> None:
        while not done.is_set():
            answers.append(cluster.ask(model="teacher", num_inference_steps=20, seed=7))

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(keep_asking) for _ in range(8)]
        try:
            until(lambda: len(cluster.replicas()) == 2)
            first, second = cluster.replicas()
            until(lambda: all(children(replica) == 2 for replica in (first, second)))  # both have both models open
            count = len(answers)
            until(lambda: len(answers) > count + 20)
            os.kill(first, signal.SIGKILL)
            count = len(answers)
            until(lambda: len(answers) > count + 20)
            until(lambda: len(set(cluster.replicas()) - {first}) == 2)
        finally:
            done.set()
        for one in asking:
            one.result()
    assert {answer.status_code for answer in answers} == {200}  # what the dead one was drawing another drew again
    assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) == 1
    assert cluster.ask(seed=5).json()["data"][0]["b64_json"] == before
    until(lambda: len(cluster.replicas()) == 1)
    assert cluster.ask(seed=5).json()["data"][0]["b64_json"] == before


def children(process: int) -> int:
    """Processes of models that a replica has."""
    return sum(1 for pid, words in running().items() if "spawn_main" in words and parent(pid) == process)


def test_what_is_being_drawn_is_finished_and_nothing_is_left(cluster: Cluster) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(cluster.ask, model="teacher", num_inference_steps=100) for _ in range(4)]
        time.sleep(0.5)
        cluster.process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200] * 4
    assert cluster.process.wait(90) == 0, cluster.log.read_text()
    until(lambda: not cluster.processes(), 30)
