"""`fewstep serve --ray` on this machine, with tiny models: all open in one cluster, in turns in another."""

import contextlib
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

from fewstep.app.serve.keys import new_key

pytest.importorskip("ray.serve", exc_type=ImportError)
httpx = pytest.importorskip("httpx")
websockets = pytest.importorskip("websockets.sync.client")
PATH = "/v1/images/generations"
COMMAND = [sys.executable, "-P", "-c", "from fewstep.app.cli import main; main()", "serve", "--ray"]
SETTINGS = """
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
    key: str = ""

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
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.post(self.url + PATH, json={"prompt": "a square", **body}, headers=headers, timeout=120)


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


@contextlib.contextmanager
def running_cluster(home: Path, settings: str, key: str = "") -> Iterator[Cluster]:
    """The command, once it serves; `settings` lacks the port."""
    folder = tempfile.mkdtemp(prefix="ray")  # sockets lie in it: their paths must be short
    port = free_port()
    (home / "ray.toml").write_text(f"port = {port}\n{settings}")
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, str(home / "ray.toml")],
            stdout=log,
            stderr=log,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": folder, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            | {"RAY_memory_monitor_refresh_ms": "0", "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1"},
        )
    cluster = Cluster(process, f"http://127.0.0.1:{port}", folder, home / "log", key)
    try:
        until(lambda: process.poll() is not None or "fewstep serves" in cluster.log.read_text(), 180)
        yield cluster
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(90)
        for left in cluster.processes():
            os.kill(left, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), SETTINGS.format(**models)) as cluster:
        assert cluster.process.poll() is None, cluster.log.read_text()
        yield cluster


@pytest.fixture(scope="module")
def bounded(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One replica with one place for two models, behind keys, with copies of the models."""
    home = tmp_path_factory.mktemp("bounded")
    copies = {name: shutil.copytree(models[name], home / name) for name in ("quick", "teacher")}
    key = new_key("ann", home / "keys.txt")
    settings = SETTINGS.format(**copies).replace("most = 2", "most = 1\nmodels = 1").replace("wait = 60", "wait = 110")
    with running_cluster(home, f'keys = "keys.txt"\n{settings}', key) as cluster:
        assert cluster.process.poll() is None, cluster.log.read_text()
        yield cluster


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


@pytest.mark.parametrize(
    ("content", "settings", "sentence"),
    [
        (None, "", r"there is no model at \S+: give the directory that `fewstep train` wrote"),
        ("", "", r"\S+ holds no fewstep.json: give a directory that `fewstep train` finished writing"),
        ("quick", "", r"cannot listen on 127.0.0.1:\d+ \(Address already in use\): give another port in the file"),
        ("quick", 'host = "0.0.0.0"', r"\S+: 0.0.0.0 is reached from other machines: make keys with .*"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    content: str | None, settings: str, sentence: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Before Ray starts."""
    if content == "":
        (tmp_path / "model").mkdir()
    elif content:
        shutil.copytree(models[content], tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:  # as Ray itself listens
        file = tmp_path / "ray.toml"
        file.write_text(f'port = {taken.getsockname()[1]}\n{settings}\n[models.quick]\npath = "model"\n')
        done = subprocess.run([*COMMAND, str(file)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 2
    assert re.fullmatch(f"fewstep: {sentence}\n", done.stderr), done.stderr


def test_damaged_weights_are_one_last_sentence(models: dict[str, Path], tmp_path: Path) -> None:
    damage(shutil.copytree(models["quick"], tmp_path / "quick"))
    settings = '[models.quick]\npath = "quick"\nengine = "torch"\n[replicas]\ncpus = 0.1\n'
    with running_cluster(tmp_path, settings) as cluster:
        assert cluster.process.wait(30) == 2
        last = cluster.log.read_text().splitlines()[-1]
        assert re.match(r"fewstep: the application does not start: cannot load \S+/transformer: ", last)
        assert not cluster.processes()


def damage(model: Path) -> None:
    """Cut the weights short."""
    with (model / "transformer" / "diffusion_pytorch_model.safetensors").open("r+b") as weights:
        weights.truncate(1000)


def test_keys_are_asked_for(bounded: Cluster) -> None:
    for headers in ({}, {"Authorization": "Bearer fs-none"}):
        assert httpx.post(bounded.url + PATH, json={"prompt": "a"}, headers=headers).status_code == 401
    assert bounded.ask(seed=1).status_code == 200


def test_models_take_turns_in_one_place(bounded: Cluster) -> None:
    first = bounded.ask(model="quick", seed=1).json()["data"][0]["b64_json"]
    (replica,) = bounded.replicas()
    with ThreadPoolExecutor(4) as pool:
        long = pool.submit(bounded.ask, model="teacher", num_inference_steps=100, seed=2, n=16)
        others = [pool.submit(bounded.ask, model=name, seed=1) for name in ("quick", "teacher")]
        assert {answer.result().status_code for answer in (long, *others)} == {200}  # each was drawn to its end
    assert others[0].result().json()["data"][0]["b64_json"] == first
    assert bounded.ask(model="quick", seed=1).json()["data"][0]["b64_json"] == first
    assert children(replica) == 1


def test_a_model_that_does_not_open_again_is_one_sentence(bounded: Cluster) -> None:
    assert bounded.ask(model="quick", seed=1).status_code == 200
    damage(bounded.log.parent / "teacher")
    refused = bounded.ask(model="teacher", seed=1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_open")
    assert bounded.ask(model="quick", seed=1).status_code == 200
