"""A picture that follows the typing, over a WebSocket; and streams of server-sent events."""

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from ..served import Server

httpx = pytest.importorskip("httpx")
websockets = pytest.importorskip("websockets.sync.client")


@contextmanager
def live(server: Server, **options: Any) -> Iterator[Any]:
    with websockets.connect(server.url.replace("http", "ws") + "/v1/images/live", **options) as socket:
        yield socket


def tell(socket: Any, **message: Any) -> None:
    socket.send(json.dumps(message))


def hear(socket: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(socket.recv(30))
    return answer


def test_each_message_is_answered_with_its_picture(server: Server) -> None:
    with live(server) as socket:
        for number in (1, 2):
            tell(socket, prompt="a red square", seed=number, id=number)
            answer = hear(socket)
            assert (answer["id"], answer["seed"]) == (number, number)
            assert Image.open(io.BytesIO(base64.b64decode(answer["b64_json"]))).size == (8, 8)


def test_the_newest_prompt_wins_and_the_rest_is_dropped(server: Server) -> None:
    with live(server) as socket:
        for number in range(1, 201):
            tell(socket, prompt=f"a square {number}", seed=1, id=number)
        numbers = [hear(socket)["id"]]
        while numbers[-1] != 200:
            numbers.append(hear(socket)["id"])
        assert numbers == sorted(numbers)
        assert len(numbers) < 100


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("no json", "invalid_json"),
        ('{"id": 3}', "invalid_request"),
        ('{"prompt": "a", "model": "b"}', "model_not_found"),
        ('{"prompt": "' + 20000 * "a" + '"}', "too_large"),
    ],
)
def test_a_message_that_is_refused_does_not_end_the_conversation(server: Server, message: str, code: str) -> None:
    with live(server) as socket:
        socket.send(message)
        assert hear(socket)["error"]["code"] == code
        tell(socket, prompt="a square", id=4)
        assert hear(socket)["id"] == 4


def test_a_page_from_elsewhere_is_not_let_in(server: Server) -> None:
    with live(server, origin=server.url):
        pass
    with pytest.raises(websockets.InvalidStatus, match="403"), live(server, origin="https://elsewhere.example"):
        pass


def events(server: Server, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    found, name = [], ""
    with httpx.stream(
        "POST", f"{server.url}/v1/images/generations", json={"stream": True, **body}, timeout=60
    ) as lines:
        for line in lines.iter_lines():
            kind, _, rest = line.partition(": ")
            if kind == "event":
                name = rest
            elif kind == "data":
                found.append((name, json.loads(rest)))
    return found


def test_a_stream_shows_what_each_evaluation_foresees_and_ends_with_the_picture(server: Server) -> None:
    body = {"prompt": "a square", "model": "teacher", "num_inference_steps": 8, "seed": 2}
    *previews, last = events(server, partial_images=3, **body)
    assert [name for name, _ in previews] == ["image_generation.partial_image"] * 3
    assert [event["partial_image_index"] for _, event in previews] == [0, 1, 2]
    assert last[0] == last[1]["type"] == "image_generation.completed"
    plain = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()
    assert last[1]["b64_json"] == plain["data"][0]["b64_json"]


def test_one_evaluation_has_nothing_to_foresee(server: Server) -> None:
    assert [name for name, _ in events(server, prompt="a square", partial_images=3)] == ["image_generation.completed"]


def test_several_images_of_a_stream_come_one_after_another(server: Server) -> None:
    body = {"prompt": "a square", "model": "slow", "n": 2, "seed": 2, "partial_images": 1}
    found = [(name.rpartition(".")[2], event.get("seed")) for name, event in events(server, **body)]
    assert found == [("partial_image", None), ("completed", 2), ("partial_image", None), ("completed", 3)]
