"""Image-to-image over HTTP."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from fewstep.runtime import Pipeline

from ..served import Server

PATH = "/v1/images/edits"


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))


def file(picture: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def ask(server: Server, content: bytes, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + PATH, data=fields, files={"image": ("a.png", content)})


def test_openais_client_gets_what_the_pipeline_makes_of_the_picture(
    server: Server, models: dict[str, Path], picture: Image.Image
) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    extra = {"seed": 3, "strength": 0.5, "num_inference_steps": 4, "guidance_scale": 2.0}
    answer = client.images.edit(
        image=("a.png", file(picture)), prompt="a square", model="teacher", n=2, extra_body=extra
    )
    assert answer.data is not None
    drawn = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one.b64_json or "")))) for one in answer.data]
    expected = Pipeline.from_pretrained(models["teacher"], "torch").generate(
        "a square", 4, seed=3, count=2, guidance=2.0, image=picture, strength=0.5
    )
    assert np.abs(np.stack(drawn).astype(int) - expected.arrays).max() <= 1


def test_events_show_the_evaluations_that_are_left(server: Server, picture: Image.Image) -> None:
    fields = {"model": "teacher", "num_inference_steps": 4, "strength": 0.75, "stream": True, "partial_images": 3}
    events = ask(server, file(picture), prompt="a square", **fields).text.split("\n\n")
    names = [event.split("\n")[0].removeprefix("event: ") for event in events if event]
    assert names == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


def whole(content: bytes) -> bytes:
    return content


@pytest.mark.parametrize(
    ("spoil", "fields", "code", "message"),
    [
        (whole, {"prompt": " "}, "invalid_request", "prompt: String should match pattern"),
        (whole, {"prompt": "a", "strength": 0}, "invalid_request", "strength: Input should be greater than 0"),
        (
            whole,
            {"prompt": "a", "strength": 0.1, "num_inference_steps": 2},
            "unsupported_strength",
            "strength 0.1 of 2",
        ),
        (whole, {"prompt": "a", "mask": "b"}, "invalid_request", "mask: Extra inputs are not permitted"),
        (whole, {"prompt": "a", "model": "quick"}, "unsupported_edit", "this model has no image-to-image"),
        (whole, {"prompt": "a", "size": "64x64"}, "unsupported_size", "this model draws 8x8 only"),
        (lambda content: content[:50], {"prompt": "a"}, "invalid_image", "image: this is no picture"),
        (lambda _: b"<svg/>", {"prompt": "a"}, "invalid_image", "image: this is no picture"),
        (lambda _: b"", {"prompt": "a"}, "invalid_image", "image: this is no picture"),
    ],
)
def test_what_cannot_be_edited_is_refused_in_a_sentence(
    server: Server,
    picture: Image.Image,
    spoil: Callable[[bytes], bytes],
    fields: dict[str, Any],
    code: str,
    message: str,
) -> None:
    answer = ask(server, spoil(file(picture)), **{"model": "teacher", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code)
    assert error["message"].startswith(message)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(server: Server) -> None:
    bomb = file(Image.new("1", (5000, 4000)))
    assert len(bomb) < 10_000
    error = ask(server, bomb, prompt="a", model="teacher").json()["error"]
    assert error["code"] == "too_many_pixels"


def test_an_upload_that_is_too_large_is_refused(server: Server) -> None:
    answer = ask(server, b"0" * (9 * 1024 * 1024), prompt="a", model="teacher")
    assert answer.status_code == 413


def test_a_field_instead_of_a_file_is_refused(server: Server) -> None:
    answer = httpx.post(server.url + PATH, data={"prompt": "a", "image": "path"})
    assert answer.status_code == 400


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats_are_taken_too(server: Server, picture: Image.Image, kind: str) -> None:
    assert ask(server, file(picture, kind), prompt="a", model="teacher", num_inference_steps=2).status_code == 200


def test_the_list_of_models_says_who_can(server: Server) -> None:
    entries = httpx.get(server.url + "/v1/models").json()["data"]
    assert {entry["id"]: entry["edits"] for entry in entries} == {"quick": False, "slow": True, "teacher": True}
