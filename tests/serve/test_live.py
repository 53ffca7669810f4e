"""A picture that follows the typing, over a WebSocket; and streams of server-sent events."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.app.serve.context import Context
from fewstep.app.serve.jobs import Job, Picture, User
from fewstep.app.serve.keys import Keys
from fewstep.app.serve.live import Conversation
from fewstep.app.serve.metrics import Metrics
from fewstep.app.serve.service import Limits

from ..served import Server
from .conftest import FACTS

httpx = pytest.importorskip("httpx")
websockets = pytest.importorskip("websockets.sync.client")
exceptions = pytest.importorskip("websockets.exceptions")


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


def test_what_is_no_text_or_no_origin_is_refused_and_told(server: Server) -> None:
    with live(server) as socket:
        socket.send(b"\x00")
        with pytest.raises(exceptions.ConnectionClosed, match="1003"):
            socket.recv(30)
    with pytest.raises(websockets.InvalidStatus, match="403"), live(server, origin="http://["):
        pass
    counted = httpx.get(server.url + "/metrics").text
    assert 'fewstep_rejections_total{cause="other_origin"}' in counted
    assert 'fewstep_request_seconds_count{path="/v1/images/live",status="200"}' in counted


class Socket:
    """A client that has sent some messages, and leaves once it has heard an answer to the last."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.heard = list(texts), list[dict[str, Any]]()
        self.scope, self._answered = {"path": "/v1/images/live"}, asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(0.05)  # who types is slower than a program
        if self.texts:
            return {"type": "websocket.receive", "text": self.texts.pop(0)}
        await self._answered.wait()
        return {"type": "websocket.disconnect"}

    async def send_json(self, answer: dict[str, Any]) -> None:
        self.heard.append(answer)
        if not self.texts:
            self._answered.set()


class Free:
    """A service that begins at once, or one that has begun nothing of what it was given first."""

    name, facts = "quick", FACTS

    def __init__(self, busy: bool) -> None:
        self.busy, self.jobs = busy, list[Job]()

    async def submit(self, jobs: Sequence[Job]) -> None:
        self.jobs += jobs
        if not self.busy or len(self.jobs) > 1:
            jobs[0].started = True
            jobs[0].picture.set_result(Picture(np.zeros((8, 8, 3), np.uint8), "none", ""))

    def discard(self, jobs: Sequence[Job]) -> None:
        pass


def converse(service: Any, texts: Sequence[str], checker: Any = None) -> list[dict[str, Any]]:
    context = Context(Limits(), Keys(), Metrics(), checker, services={"quick": service})
    socket: Any = Socket(texts)
    asyncio.run(asyncio.wait_for(Conversation(socket, context, User("one")).follow(), 10))
    return list(socket.heard)


def test_what_no_engine_has_begun_makes_room_for_what_is_newer() -> None:
    service = Free(busy=True)
    heard = converse(service, ['{"prompt": "a", "id": 1}', '{"prompt": "b", "id": 2}'])
    assert [answer["id"] for answer in heard] == [2]
    assert [job.prompt for job in service.jobs] == ["a", "b"]
    assert service.jobs[0].picture.cancelled()


def test_what_the_operators_checker_flags_is_not_shown() -> None:
    def check(prompts: Sequence[str], pixels: Sequence[np.ndarray[Any, Any]]) -> list[bool]:
        assert [picture.shape for picture in pixels] == [(8, 8, 3)]
        return [prompt == "a" for prompt in prompts]

    heard = converse(Free(busy=False), ['{"prompt": "a", "id": 1}', '{"prompt": "b", "id": 2}'], check)
    assert heard[0]["error"]["code"] == "content_policy_violation"
    assert "b64_json" not in heard[0]
    assert "b64_json" in heard[1]


def test_a_fault_of_the_server_is_answered_and_does_not_end_the_conversation(caplog: pytest.LogCaptureFixture) -> None:
    def check(prompts: Sequence[str], _: object) -> list[bool]:
        if prompts == ["a"]:
            raise RuntimeError("the checker is broken")
        return [False]

    heard = converse(Free(busy=False), ['{"prompt": "a", "id": 1}', '{"prompt": "b", "id": 2}'], check)
    assert heard[0] == {"id": 1, "error": heard[0]["error"]}
    assert heard[0]["error"]["code"] == "server_error"
    assert "b64_json" in heard[1]
    assert "the checker is broken" in caplog.text


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
