"""The page as people meet it: in a browser, against a running server."""

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from ..served import Server, start

httpx = pytest.importorskip("httpx")

PICTURE = "#live-picture"
PROMPT = "#prompt :is(input, textarea)"
WAIT = 20_000
OPENING = 120_000
"""Milliseconds until torch must be open in another process, however busy the machine."""


@pytest.fixture
def page(demo: Server, chromium: Any) -> Iterator[Any]:
    """The page, with its first picture; all it asks for is on this server and found, and no script fails."""
    page, asked, errors = open_page(chromium, demo)
    yield page
    assert {urlsplit(url).netloc for url in asked if url.startswith(("http", "ws"))} == {urlsplit(demo.url).netloc}
    assert errors == []
    page.context.close()


def open_page(chromium: Any, demo: Server, width: int = 1280, script: str = "") -> tuple[Any, list[str], list[str]]:
    page = chromium.new_context(viewport={"width": width, "height": 800}).new_page()
    page.add_init_script(script)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: "with a status of" in line.text and errors.append(line.text))
    page.goto(demo.url)
    page.wait_for_selector(f"{PICTURE}:not([hidden])", timeout=WAIT)
    return page, asked, errors


def source(page: Any) -> str:
    return str(page.get_attribute(PICTURE, "src"))


def changes(page: Any, before: str) -> str:
    """The picture that is shown next."""
    page.wait_for_function(f"before => document.querySelector('{PICTURE}').src !== before", arg=before, timeout=WAIT)
    return source(page)


def show(page: Any, tab: str, button: str, done: str) -> None:
    page.get_by_role("tab", name=tab).click()
    page.get_by_role("button", name=button, exact=True).click()
    page.wait_for_selector(done, timeout=WAIT)


def saved(page: Any, selector: str) -> tuple[str, Image.Image]:
    with page.expect_download() as download:
        page.click(selector)
    return download.value.suggested_filename, Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))


def test_a_browser_without_idle_callbacks_draws_too(demo: Server, chromium: Any) -> None:
    """Safari is one."""
    page, _, errors = open_page(chromium, demo, script="delete window.requestIdleCallback")
    assert errors == []
    page.context.close()


def test_nothing_is_uploaded(demo: Server) -> None:
    answer = httpx.post(f"{demo.url}/demo/gradio_api/upload", files={"files": b"0"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_typing_draws_and_every_setting_counts(page: Any) -> None:
    first = source(page)
    page.fill(PROMPT, "")
    page.type(PROMPT, "a blue square")
    second = changes(page, first)
    page.fill("#seed input", "8")
    third = changes(page, second)
    assert page.get_attribute("#steps input", "max") == "2"  # positions of 1, 2 and 4
    page.focus("#steps input")
    page.keyboard.press("End")
    changes(page, third)
    assert page.inner_text("#steps output") == "4"
    name, image = saved(page, ".live .save")
    assert name == "a-blue-square-8.png"
    assert image.info["prompt"] == "a blue square"
    assert (image.info["seed"], image.info["num_inference_steps"], image.info["engine"]) == ("8", "4", "torch")


def test_the_newest_prompt_wins(page: Any) -> None:
    page.type(PROMPT, " and a long row of words that nobody waits for", delay=1)
    page.fill(PROMPT, "the last")
    page.wait_for_function("document.querySelector('#live-picture').dataset.file === 'the-last-7.png'", timeout=WAIT)
    page.wait_for_timeout(300)
    assert saved(page, ".live .frame")[1].info["prompt"] == "the last"


def test_an_open_seed_changes_with_every_draw_and_a_locked_one_stays(page: Any) -> None:
    first = source(page)
    page.uncheck("#lock input")
    second = changes(page, first)
    seed = page.input_value("#seed input")
    assert seed != "7"
    page.type(PROMPT, "!")
    third = changes(page, second)
    assert page.input_value("#seed input") != seed
    page.check("#lock input")
    locked = page.input_value("#seed input")
    page.type(PROMPT, "!")
    changes(page, third)
    assert page.input_value("#seed input") == locked


def test_student_and_teacher_side_by_side(page: Any) -> None:
    page.fill(PROMPT, "a green ${1} {{square}}")
    show(page, "Teacher", "Draw both", ".told strong")
    assert page.locator(".card figcaption").all_inner_texts() == ["Student", "Teacher"]
    assert page.inner_text(".told strong").endswith("×")
    assert "50 steps on torch" in page.inner_text(".card:last-child")
    assert page.locator(".clock").count() == 0
    name, image = saved(page, ".card:first-child .frame")
    assert name == "a-green-1-square-7.png"
    assert (image.info["prompt"], image.info["model"]) == ("a green ${1} {{square}}", "student")


def test_grids_of_styles_and_seeds(page: Any) -> None:
    show(page, "Grids", "Seeds", ".tile")
    assert page.locator(".tile figcaption").all_inner_texts() == [str(seed) for seed in range(7, 19)]
    page.get_by_role("button", name="Styles", exact=True).click()
    page.wait_for_selector(".tile figcaption:text('flat')", timeout=WAIT)
    assert page.locator(".tile").count() == 8


def test_every_engine_that_is_here(page: Any) -> None:
    show(page, "Engines", "Compare engines", ".card")
    page.wait_for_selector("text=Torch is the only engine here", timeout=OPENING)
    assert "the reference" in page.inner_text(".card")


def test_a_fault_is_one_sentence(page: Any) -> None:
    page.fill(PROMPT, "")
    show(page, "Grids", "Seeds", ".tabitem .fault:visible")
    assert page.inner_text(".tabitem .fault:visible") == "There is no prompt: type what to draw."


def test_another_student_brings_its_own_steps(page: Any) -> None:
    page.click("#model input")
    page.get_by_role("option", name="other").click()
    page.wait_for_function("document.querySelector('#steps output').textContent === '2'", timeout=WAIT)
    page.wait_for_function("!document.querySelector('#live-fault').textContent", timeout=WAIT)
    page.type(PROMPT, "!")
    changes(page, source(page))
    assert saved(page, ".live .save")[1].info["model"] == "other"


def test_a_phone_has_every_tab_and_nothing_beside_the_screen(demo: Server, chromium: Any) -> None:
    page, _, _ = open_page(chromium, demo, width=360)
    for tab in ("Draw", "Teacher", "Grids", "Engines", "Speed"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.context.close()


def test_a_server_that_stops_is_one_clear_line_and_one_that_is_back_goes_on(
    models: list[str], chromium: Any, tmp_path: Path
) -> None:
    command = ["demo", models[0], models[2], "--engine", "torch", "--port"]
    demo = start(tmp_path / "log", *command, 0)
    page, _, errors = open_page(chromium, demo)
    show(page, "Engines", "Compare engines", ".clock")
    demo.process.kill()
    demo.process.wait(30)
    assert demo.process.stdout is not None
    demo.process.stdout.close()  # a model that is being opened holds it open a while longer
    page.wait_for_selector("#unanswered:visible", timeout=WAIT)
    assert page.inner_text("#unanswered").startswith("The server does not answer: start it again with `fewstep demo`")
    assert page.inner_text(".card .value") == "no answer"

    before = source(page)
    demo = start(tmp_path / "log-again", *command, urlsplit(demo.url).port)
    page.wait_for_selector("#unanswered", state="hidden", timeout=WAIT)
    page.get_by_role("tab", name="Draw").click()
    page.fill(PROMPT, "a blue square, drawn by the next server")
    changes(page, before)
    show(page, "Teacher", "Draw both", ".told strong")
    assert errors == []
    page.context.close()
    assert demo.stop() in (0, -signal.SIGTERM)


def test_the_api_stays_where_it_is(demo: Server) -> None:
    names = [entry["id"] for entry in httpx.get(f"{demo.url}/v1/models").json()["data"]]
    assert names == ["student", "other", "teacher"]
    assert httpx.get(demo.url).headers["location"] == "/demo/"
    assert "frame-ancestors 'none'" in httpx.get(f"{demo.url}/demo/").headers["content-security-policy"]
    assert httpx.get(f"{demo.url}/demo/", headers={"Host": "elsewhere.example"}).status_code == 400
    assert json.loads(httpx.get(f"{demo.url}/nowhere").content)["error"]["code"] == "not_found"
