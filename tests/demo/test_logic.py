"""What the page shows, without a browser: words, cards, charts, engines' likeness, and the command's refusals."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fewstep.runtime.errors import FewstepError

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("gradio")

from fewstep.app.cli import app
from fewstep.app.demo import cards, words
from fewstep.app.demo.chart import benchmark
from fewstep.app.demo.drawing import Drawing, request_for
from fewstep.app.demo.scenes import chosen_seed
from fewstep.app.psnr import psnr
from fewstep.app.serve.faults import FaultError

ROWS: list[dict[str, Any]] = [
    {"label": "teacher", "kind": "teacher", "sampler": "ddim", "steps": 8, "engine": "torch",
     "milliseconds_batch_1": 800.0, "speedup_batch_1": 1.0, "fd": 10.0, "match_at_1": 0.5},
    {"label": "teacher", "kind": "teacher", "sampler": "ddim", "steps": 2, "engine": "torch",
     "milliseconds_batch_1": 200.0, "speedup_batch_1": 4.0, "fd": 30.0, "match_at_1": 0.2},
    {"label": "student", "kind": "student", "sampler": "consistency", "steps": 1, "engine": "onnx",
     "milliseconds_batch_1": 10.0, "speedup_batch_1": 80.0, "fd": 12.0, "match_at_1": 0.45},
]  # fmt: skip
MACHINE = {"processor": "<one>", "date": "2026-01-02", "commit": "abc"}


def test_a_prompt_in_every_style_keeps_its_subject() -> None:
    expected = [f"a red apple, {style}" for style in words.STYLE_WORDS]
    assert words.in_every_style("a red apple") == expected
    for styled in expected:
        assert words.in_every_style(styled) == expected
    assert words.in_every_style(words.STYLE_WORDS[0]) == list(words.STYLE_WORDS)


def test_the_examples_are_worded_as_captions() -> None:
    assert "a red apple, fluent 3d style" in words.PROMPTS
    assert any(prompt.startswith("an avocado, ") for prompt in words.PROMPTS)


def test_a_locked_seed_stays_and_an_open_one_changes() -> None:
    assert {chosen_seed(7, True) for _ in range(20)} == {7}
    assert len({chosen_seed(7, False) for _ in range(20)}) > 1
    assert chosen_seed(None, True) >= 0


@pytest.mark.parametrize(
    ("prompt", "seed", "steps", "sentence"),
    [
        (" ", 1, 1, "type what to draw"),
        ("a", -1, 1, "seed"),
        ("a", 1, 0, "num_inference_steps"),
        ("a" * 1001, 1, 1, "prompt"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(prompt: str, seed: int, steps: int, sentence: str) -> None:
    with pytest.raises(FaultError, match=sentence):
        request_for(prompt, seed, steps, "student")


def test_what_people_type_is_shown_and_never_run() -> None:
    drawing = Drawing(b"png", np.zeros((8, 8, 3), np.uint8), '"><script>${1}{{2}}`', 3, 1, "m", "torch", 12.34)
    shown = cards.card(drawing, "<b>", ["<i>"])
    assert not re.search(r"<script|<b>|<i>|\$|[{}`]", shown)
    assert "12.3&nbsp;ms" in shown
    assert 'data-file="script-1-2-3.png"' in shown


def test_times_have_the_digits_that_matter() -> None:
    texts = [cards.milliseconds(value).replace("&nbsp;", " ") for value in (9.87, 123.4, 1808.8, 12_345.0)]
    assert texts == ["9.9 ms", "123 ms", "1,809 ms", "12.3 s"]


def test_likeness_is_the_peak_signal_to_noise_ratio() -> None:
    picture = np.full((4, 4, 3), 200, np.uint8)
    assert psnr(picture, picture) == float("inf")
    assert psnr(picture, picture - 255 // 5) == pytest.approx(20 * np.log10(5))  # below and above: no wrapping around
    assert psnr(picture - 51, picture) == pytest.approx(20 * np.log10(5))


def test_the_benchmark_is_drawn_from_its_json(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"machine": MACHINE, "rows": ROWS}))
    shown = benchmark(file)
    assert shown.count("<svg") == 2
    assert shown.count("<circle") == 2 * len(ROWS)
    assert "80×" in shown
    assert "&lt;one&gt;" in shown
    places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', shown)
    (slow, fast, student), match = [tuple(map(float, place)) for place in places[1::-1] + places[2:3]], places[3:]
    assert student[0] < fast[0] < slow[0]  # the costlier, the further right
    assert slow[1] > student[1] > fast[1]  # the lower the distance, the lower the point
    assert float(match[0][1]) > float(match[1][1])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "There is no bench.json yet: &#96;fewstep bench --data DIR&#96; makes it."),
        ({"machine": MACHINE, "rows": [{"label": "a"}]}, "bench.json has times only"),
        ({"rows": ROWS}, "is not what"),
        ([1], "is not what"),
    ],
)
def test_a_benchmark_that_is_missing_is_one_line_with_the_command(tmp_path: Path, content: Any, sentence: str) -> None:
    file = tmp_path / "bench.json"
    if content is not None:
        file.write_text(json.dumps(content))
    assert sentence in benchmark(file)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "0.0.0.0"], "other machines"),
        (["nowhere"], "nowhere"),
        (["TEACHER"], "no student"),
    ],
)
def test_what_it_will_not_start_with(models: list[str], arguments: list[str], sentence: str) -> None:
    given = [models[-1] if argument == "TEACHER" else argument for argument in arguments]
    outcome = CliRunner().invoke(app, ["demo", *given])
    assert isinstance(outcome.exception, FewstepError)
    assert sentence in str(outcome.exception)
