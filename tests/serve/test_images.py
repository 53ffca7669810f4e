"""The image API as its clients see it; OpenAI's own is the first of them."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.runtime import Pipeline

from ..served import Server

httpx = pytest.importorskip("httpx")
PATH = "/v1/images/generations"


def pixels(encoded: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def ask(server: Server, **body: Any) -> Any:
    answer = httpx.post(server.url + PATH, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def close(one: Any, other: Any) -> bool:
    """Batches of other sizes are rounded otherwise, which may change a level by one."""
    return bool(np.abs(one.astype(int) - other.astype(int)).max() <= 1)


def test_openais_client_gets_the_images_that_the_pipeline_draws(server: Server, models: dict[str, Path]) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0)
    answer = client.images.generate(model="quick", prompt="a red square", n=2, size="8x8", extra_body={"seed": 7})
    expected = Pipeline.from_pretrained(models["quick"], "torch").generate("a red square", seed=7, count=2)
    for data, array in zip(answer.data, expected.arrays, strict=True):
        assert close(pixels(data.b64_json), array)
    assert [model.id for model in client.models.list()] == list(models)


def test_several_prompts_come_in_their_order_with_seeds_that_count_up(server: Server) -> None:
    answer = ask(server, prompt=["a red square", "a blue square"], n=2, seed=3)
    assert [data["seed"] for data in answer["data"]] == [3, 4, 3, 4]
    alone = ask(server, prompt="a blue square", seed=4)
    assert close(pixels(answer["data"][3]["b64_json"]), pixels(alone["data"][0]["b64_json"]))


def test_without_a_seed_each_image_is_another_and_its_seed_makes_it_again(server: Server) -> None:
    one, other = (ask(server, prompt="a square")["data"][0] for _ in range(2))
    assert one["seed"] != other["seed"]
    again = ask(server, prompt="a square", seed=one["seed"])["data"][0]
    assert close(pixels(again["b64_json"]), pixels(one["b64_json"]))


def test_the_file_says_what_made_it(server: Server) -> None:
    answer = ask(server, prompt="ein grünes Quadrat", seed=5, model="slow")
    text = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).text
    assert text["prompt"] == "ein grünes Quadrat"
    assert (text["seed"], text["num_inference_steps"], text["model"]) == ("5", "2", "slow")
    assert text["software"].startswith("fewstep ")
    assert (answer["size"], answer["steps"], answer["engine"]) == ("8x8", 2, "torch")


def test_a_teacher_takes_guidance_and_steps(server: Server, models: dict[str, Path]) -> None:
    answer = ask(server, prompt="a square", model="teacher", num_inference_steps=3, guidance_scale=2, seed=1)
    expected = Pipeline.from_pretrained(models["teacher"], "torch").generate("a square", 3, seed=1, guidance=2.0)
    assert close(pixels(answer["data"][0]["b64_json"]), expected.arrays[0])


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({}, 400, "invalid_request", "prompt: Field required"),
        ({"prompt": ""}, 400, "invalid_request", "prompt: String should have at least 1 character"),
        ({"prompt": " \n"}, 400, "invalid_request", "prompt: String should match pattern"),
        ({"prompt": "a" * 1001}, 400, "invalid_request", "prompt: String should have at most 1000 characters"),
        ({"prompt": ["a", ""]}, 400, "invalid_request", "prompt.1: String should have at least 1 character"),
        ({"prompt": []}, 400, "invalid_request", "prompt: List should have at least 1 item"),
        ({"prompt": ["a"] * 17}, 400, "invalid_request", "prompt: List should have at most 16 items"),
        ({"prompt": "a", "n": 0}, 400, "invalid_request", "n: Input should be greater than or equal to 1"),
        ({"prompt": "a", "n": 17}, 400, "invalid_request", "n: Input should be less than or equal to 16"),
        ({"prompt": "a", "n": "1"}, 400, "invalid_request", "n: Input should be a valid integer"),
        ({"prompt": "a", "seed": -1}, 400, "invalid_request", "seed: Input should be greater than or equal to 0"),
        ({"prompt": "a", "quality": "hd"}, 400, "invalid_request", "quality: Extra inputs are not permitted"),
        ({"prompt": "a", "response_format": "url"}, 400, "invalid_request", "response_format: Input should be 'b64_"),
        ({"prompt": "a", "size": "64x64"}, 400, "unsupported_size", "this model draws 8x8 only"),
        ({"prompt": "a", "num_inference_steps": 2}, 400, "unsupported_steps", "this model takes 1 steps"),
        ({"prompt": "a", "guidance_scale": 2}, 400, "unsupported_guidance", "this model has its guidance built in"),
        ({"prompt": "a", "negative_prompt": "b"}, 400, "unsupported_negative", "this model has no negative prompt"),
        ({"prompt": "a", "model": "../x"}, 404, "model_not_found", "there is no model '../x'"),
        ({"prompt": "\x1c"}, 400, "invalid_request", "prompt: String should match pattern"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(
    server: Server, body: dict[str, Any], status: int, code: str, message: str
) -> None:
    answer = httpx.post(server.url + PATH, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert error["message"].startswith(message)


def test_a_body_that_is_no_json_or_too_large_is_refused(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(server.url + PATH, content=b'{"prompt": ', headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    for content in (b"x" * 70_000, (b"x" * 1000 for _ in range(70))):  # with its length declared, and without
        answer = httpx.post(server.url + PATH, content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_other_paths_and_verbs_are_refused_in_the_same_way(server: Server) -> None:
    assert httpx.get(server.url + "/etc/passwd").json()["error"]["code"] == "not_found"
    answer = httpx.get(server.url + PATH)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


def test_a_name_that_is_not_this_machines_is_refused(server: Server) -> None:
    assert httpx.get(server.url + "/health", headers={"Host": "elsewhere.example"}).status_code == 400


def test_other_pages_may_not_ask(server: Server) -> None:
    answer = httpx.options(
        server.url + PATH, headers={"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    )
    assert "access-control-allow-origin" not in answer.headers
    for origin, status in (("https://elsewhere.example", 403), ("null", 403), ("http://[", 403), (server.url, 200)):
        answer = httpx.post(server.url + PATH, json={"prompt": "a square"}, headers={"Origin": origin}, timeout=60)
        assert answer.status_code == status


def test_the_log_and_the_metrics_tell_what_happened_and_no_prompt(server: Server) -> None:
    ask(server, prompt="a most secret square")
    metrics = httpx.get(server.url + "/metrics").text
    assert 'fewstep_images_total{engine="torch",model="quick"}' in metrics
    assert 'fewstep_request_seconds_bucket{le="0.001",path="/v1/images/generations",status="200"}' in metrics
    assert 'fewstep_queue_images{model="quick"} 0.0' in metrics
    assert '"path": "/v1/images/generations", "status": 200' in server.log.read_text()
    assert "secret" not in metrics + server.log.read_text()


def test_it_is_alive_and_ready(server: Server) -> None:
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    assert httpx.get(server.url + "/ready").json() == {"status": "ready"}
