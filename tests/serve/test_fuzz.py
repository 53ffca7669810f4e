"""Requests that nobody would write; `make fuzz` sends ten thousand of them."""

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ..served import Server
from ..tiny_models import save_tiny
from .conftest import start_server

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

BOUNDARY = "fuzz"
JSON = json.dumps({"prompt": ["a", "b"], "n": 2, "seed": 7, "size": "8x8", "num_inference_steps": 2}).encode()
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one student, which the document describes exactly; it must have survived all tests of this file."""
    folder = tmp_path_factory.mktemp("fuzzed")
    server = start_server(folder / "log", save_tiny(folder / "model", "student", [1, 2, 4]))
    yield server
    assert httpx.get(server.url + "/ready").json() == {"status": "ready"}
    server.stop()
    assert "trace" not in (folder / "log").read_text()


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
def test_whatever_is_made_up_from_the_document_gets_an_answer_that_it_names(
    student: Server, path: str, mode: Any
) -> None:
    operation = schemathesis.openapi.from_url(student.url + "/openapi.json")[path]["POST"]
    # The document cannot tell what bytes are a picture.
    excluded = [positive_data_acceptance] if path == "/v1/images/edits" else []

    @patient
    @given(operation.as_strategy(mode))
    def check(case: Any) -> None:
        case.call_and_validate(excluded_checks=excluded)

    check()


def form() -> bytes:
    """The body of an edit, with its picture."""
    file = io.BytesIO()
    Image.effect_noise((20, 30), 99).save(file, "PNG")
    fields = {"prompt": b"a", "strength": b"0.5", "num_inference_steps": b"4", "n": b"2"}
    parts = [f'form-data; name="{name}"'.encode() + b"\r\n\r\n" + value for name, value in fields.items()]
    parts.append(b'form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + file.getvalue())
    start = f"--{BOUNDARY}\r\nContent-Disposition: ".encode()
    return b"".join(start + part + b"\r\n" for part in parts) + f"--{BOUNDARY}--\r\n".encode()


REQUESTS = {
    "generations": ("application/json", JSON),
    "edits": (f"multipart/form-data; boundary={BOUNDARY}", form()),
}


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A body with pieces overwritten, cut out or repeated."""
    body = whole
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(body)))
        end = draw(st.integers(start, min(len(body), start + 64)))
        piece = draw(st.one_of(st.binary(max_size=16), st.just(b""), st.just(2 * body[start:end])))
        body = body[:start] + piece + body[end:]
    return body


@pytest.mark.parametrize("name", REQUESTS)
def test_a_body_that_is_damaged_is_refused_in_a_sentence_or_drawn(student: Server, name: str) -> None:
    kind, whole = REQUESTS[name]
    with httpx.Client(base_url=student.url, headers={"Content-Type": kind}) as client:
        assert client.post(f"/v1/images/{name}", content=whole).status_code == 200

        @patient
        @given(damaged(whole))
        def check(body: bytes) -> None:
            answer = client.post(f"/v1/images/{name}", content=body)
            if answer.status_code == 200:
                assert answer.json()["data"]
            else:
                assert answer.status_code in (400, 404)
                assert answer.json()["error"]["message"]

        check()
