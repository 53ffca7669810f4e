"""What must not bring the service down: dead processes, full queues, rubbish on the disk, clients that leave."""

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ..served import Server
from .conftest import start_server

httpx = pytest.importorskip("httpx")
PATH = "/v1/images/generations"
SLOW = {"prompt": "a square", "model": "teacher", "num_inference_steps": 100}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers, and ends those that still run."""
    servers: list[Server] = []

    def begin(*arguments: object) -> Server:
        servers.append(start_server(tmp_path / f"log-{len(servers)}.jsonl", *arguments))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.stop()


def ask(server: Server, **body: Any) -> Any:
    return httpx.post(server.url + PATH, json={"prompt": "a square", **body}, timeout=60)


def workers(server: Server) -> list[int]:
    """Processes of the last models that were opened, from the log."""
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    return next(line["processes"] for line in reversed(lines) if line["event"] in ("ready", "reloaded"))


def logged(server: Server, event: str, seconds: float = 60) -> bool:
    """Wait until the log says so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if f'"event": "{event}"' in server.log.read_text():
            return True
        time.sleep(0.05)
    return False


def test_a_worker_that_is_killed_is_replaced_and_no_request_is_lost(
    models: dict[str, Path], start: Callable[..., Server]
) -> None:
    server = start(models["quick"], "--wait", 60)
    before = [data["b64_json"] for data in ask(server, seed=1, n=4).json()["data"]]
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, server, seed=1, n=4) for _ in range(24)]
        time.sleep(0.05)
        os.kill(workers(server)[0], signal.SIGKILL)
        outcomes = [answer.result() for answer in answers]
    assert [outcome.status_code for outcome in outcomes] == [200] * 24
    assert all([data["seed"] for data in outcome.json()["data"]] == [1, 2, 3, 4] for outcome in outcomes)
    assert logged(server, "a worker ended")
    assert 'fewstep_worker_restarts_total{model="quick"} 1.0' in httpx.get(server.url + "/metrics").text
    assert [data["b64_json"] for data in ask(server, seed=1, n=4).json()["data"]] == before


def test_a_request_does_not_wait_longer_than_promised_for_a_worker_that_ended(
    models: dict[str, Path], start: Callable[..., Server]
) -> None:
    server = start(models["quick"], "--wait", 0.2)
    os.kill(workers(server)[0], signal.SIGKILL)
    begin = time.monotonic()
    answer = ask(server)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "waited_too_long")
    assert time.monotonic() - begin < 5


def test_a_full_queue_says_when_to_come_back_and_serves_the_others(
    models: dict[str, Path], start: Callable[..., Server]
) -> None:
    server = start(f"teacher={models['teacher']}", "--wait", 0.5, "--largest-batch", 1)
    with ThreadPoolExecutor(32) as pool:
        begin = time.monotonic()
        outcomes = list(pool.map(lambda seed: ask(server, num_inference_steps=100, seed=seed), range(32)))
    statuses = [outcome.status_code for outcome in outcomes]
    assert set(statuses) <= {200, 429, 503}
    assert statuses.count(200) >= 1
    assert 429 in statuses
    refused = next(outcome for outcome in outcomes if outcome.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert time.monotonic() - begin < 30
    assert 'fewstep_rejections_total{cause="queue_full"}' in httpx.get(server.url + "/metrics").text


def test_reloading_takes_the_new_model_and_keeps_the_old_one_if_that_is_rubbish(
    models: dict[str, Path], tmp_path: Path, start: Callable[..., Server]
) -> None:
    from ..tiny_models import save_tiny

    model = tmp_path / "model"
    shutil.copytree(models["quick"], model)
    server = start(model)
    (model / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"rubbish")
    server.process.send_signal(signal.SIGHUP)
    assert logged(server, "not reloaded")
    assert ask(server).status_code == 200
    shutil.rmtree(model)
    save_tiny(model, "student", [2])
    done = threading.Event()
    statuses = []

    def keep_asking() -> None:
        while not done.is_set():
            statuses.append(ask(server).status_code)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    server.process.send_signal(signal.SIGHUP)
    assert logged(server, "reloaded")
    done.set()
    asking.join()
    assert set(statuses) == {200}
    assert ask(server).json()["steps"] == 2
    metrics = httpx.get(server.url + "/metrics").text
    for outcome in ("failed", "done"):
        assert f'fewstep_reloads_total{{model="model",outcome="{outcome}"}} 1.0' in metrics


def test_what_waits_is_finished_before_the_server_ends(models: dict[str, Path], start: Callable[..., Server]) -> None:
    server = start(f"teacher={models['teacher']}", "--wait", 30)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, server, num_inference_steps=100) for _ in range(4)]
        time.sleep(0.3)
        assert server.stop() in (0, -signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200] * 4


def test_a_client_that_leaves_frees_its_place(models: dict[str, Path], start: Callable[..., Server]) -> None:
    server = start(f"teacher={models['teacher']}", "--largest-batch", 1, "--wait", 60)
    for _ in range(12):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + PATH, json=SLOW | {"n": 4}, timeout=0.05)
    end = time.monotonic() + 30
    while 'fewstep_queue_images{model="teacher"} 0.0' not in httpx.get(server.url + "/metrics").text:
        assert time.monotonic() < end
    assert '"status": 499' in server.log.read_text()
    assert ask(server, num_inference_steps=1).status_code == 200


def test_half_closed_and_slow_clients_hold_up_nobody(models: dict[str, Path], start: Callable[..., Server]) -> None:
    server = start(models["quick"])
    place = urlsplit(server.url)
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
    opened = []
    for content in (b"", b"GET", head.encode(), head.encode() + b'{"prompt"', b"GET / HTTP/1.1\r\nA: " + 70000 * b"b"):
        connection = socket.create_connection((place.hostname or "", place.port or 0))
        connection.sendall(content)
        opened.append(connection)
    opened[3].shutdown(socket.SHUT_WR)
    assert ask(server).status_code == 200
    for connection in opened:
        connection.settimeout(30)
    assert b"408" in opened[2].recv(4096)  # its body never came
    for silent in (opened[0], opened[1], opened[4]):  # nor the head of these, or too much of it
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(4096) == b""
    assert server.log.read_text().count('"event": "connection closed"') == 3
    for connection in opened:
        connection.close()
    assert ask(server).status_code == 200


def test_the_log_tells_prompts_only_if_it_was_asked_to(models: dict[str, Path], start: Callable[..., Server]) -> None:
    server = start(models["quick"], "--log-prompts")
    assert ask(server, prompt="a green square", seed=5).status_code == 200
    server.stop()
    told = [line for line in map(json.loads, server.log.read_text().splitlines()) if line["event"] == "drawing"]
    assert [(line["prompt"], line["seed"], line["model"]) for line in told] == [("a green square", 5, "quick")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_is_full_costs_the_log_and_nothing_else(models: dict[str, Path]) -> None:
    server = start_server(Path("/dev/full"), models["quick"])
    try:
        assert all(ask(server, prompt="a square").status_code == 200 for _ in range(3))
    finally:
        assert server.stop() in (0, -signal.SIGTERM)


def test_the_port_may_be_taken_and_the_model_may_be_none(
    server: Server, models: dict[str, Path], tmp_path: Path
) -> None:
    port = urlsplit(server.url).port
    with pytest.raises(RuntimeError, match=f"cannot listen on 127.0.0.1:{port} .*: give another --port"):
        start_server(tmp_path / "log", models["quick"], "--port", port)
    with pytest.raises(RuntimeError, match=r"fewstep: .*there is no model at .*: give the directory that"):
        start_server(tmp_path / "log", tmp_path / "nothing")
    with pytest.raises(RuntimeError, match="two models are called quick"):
        start_server(tmp_path / "log", models["quick"], models["quick"])
    with pytest.raises(RuntimeError, match="is reached from other machines: make keys with `fewstep key`"):
        start_server(tmp_path / "log", models["quick"], "--host", "0.0.0.0")
    with pytest.raises(RuntimeError, match="there is no checker nowhere:check"):
        start_server(tmp_path / "log", models["quick"], "--checker", "nowhere:check")
