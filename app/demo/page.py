"""The layout: what is set at the top, and a tab for each scene."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import gradio as gr

from ..serve.jobs import User
from . import cards
from .chart import benchmark
from .scenes import Choice, Scenes, chosen_seed
from .words import PROMPTS, SUBJECTS

Scene = Callable[[User, Choice], AsyncIterator[str]]

FOLDER = Path(__file__).parent
CSS, SCRIPT, ICON = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "icon.svg"))
HEAD = f"<script>{SCRIPT}</script>"
AT_ONCE, WAITING = 2, 16
"""Scenes that run together, and that wait: the models' own queues bound what they draw."""

HEADER = "<header><h1>fewstep</h1><p>Type, and the student draws: every key is a new picture.</p></header>"
UNANSWERED = '<p id="unanswered" class="fault" role="alert" hidden></p>'
LIVE = """<section class="live"><button class="frame" type="button" disabled title="Save the picture">
<img id="live-picture" alt="" hidden></button>
<div><p class="value" id="live-milliseconds" aria-live="off">–</p><p class="hint">from prompt to PNG, on the server</p>
<ul id="live-facts"></ul><p id="live-fault" class="fault" role="alert" hidden></p>
<button class="save" type="button" data-save="live-picture" disabled>Save PNG</button></div></section>"""
STEPS = """<label class="steps"><span>Steps <output>${value}</output></span>
<input type="range" aria-label="Steps" min="0" max="${counts.length - 1}" step="1" value="${counts.indexOf(value)}"
  data-counts="${counts.join(' ')}" ${counts.length > 1 ? '' : 'hidden'}></label>"""
STEPS_CHANGED = """element.addEventListener("change", (event) => {
  props.value = Number(event.target.dataset.counts.split(" ")[event.target.value]);
  trigger("change");
});"""


def theme() -> gr.themes.Base:
    """Quiet, with the fonts of the machine."""
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    return gr.themes.Base(primary_hue="indigo", neutral_hue="zinc", radius_size="lg", font=fonts, font_mono=mono).set(
        block_border_width="0px",
        block_shadow="none",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_padding="0px",
    )


def build_page(scenes: Scenes, bench: Path) -> gr.Blocks:
    """The page, whose events go through a bounded queue and have no addresses of their own."""
    with gr.Blocks(title="fewstep", analytics_enabled=False) as page:
        gr.HTML(HEADER + UNANSWERED)
        inputs = _settings(scenes)
        with gr.Tabs():
            with gr.Tab("Draw"):
                gr.HTML(LIVE)
            _scene(
                inputs,
                "Teacher",
                {"Draw both": scenes.both},
                "One prompt and seed: the student, then its teacher.",
            )
            _scene(
                inputs,
                "Grids",
                {"Styles": scenes.styles, "Seeds": scenes.seeds},
                "One prompt in every style, or with one seed after another.",
            )
            _scene(
                inputs,
                "Engines",
                {"Compare engines": scenes.engines},
                "One prompt and seed on every engine that was exported here, and on torch.",
            )
            with gr.Tab("Speed"):
                gr.HTML(benchmark(bench), padding=False)
    page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE, api_open=False)
    return page


def _settings(scenes: Scenes) -> list[gr.components.Component]:
    """Prompt, seed, lock, steps and model; those that the scenes take."""
    names = list(scenes.students)
    first = names[0]
    prompt = gr.Textbox(
        PROMPTS[0], label="Prompt", show_label=False, placeholder="What to draw", max_lines=1,
        max_length=1000, elem_id="prompt",
    )  # fmt: skip
    gr.HTML(_examples())
    with gr.Row(elem_id="settings"):
        seed = gr.Number(7, label="Seed", precision=0, minimum=0, min_width=110, elem_id="seed")
        lock = gr.Checkbox(True, label="Keep the seed", min_width=140, elem_id="lock")
        counts = scenes.students[first]
        steps = gr.HTML(
            counts[0],
            counts=list(counts),
            html_template=STEPS,
            js_on_load=STEPS_CHANGED,
            min_width=160,
            elem_id="steps",
        )
        model = gr.Dropdown(names, value=first, label="Student", visible=len(names) > 1, min_width=180, elem_id="model")
    model.change(
        lambda name: gr.HTML(scenes.students[name][0], counts=list(scenes.students[name])), model, steps,
        queue=False, api_visibility="private",
    )  # fmt: skip
    return [prompt, seed, lock, steps, model]


def _examples() -> str:
    named = [(cards.escaped(prompt), cards.escaped(subject)) for prompt, subject in zip(PROMPTS, SUBJECTS, strict=True)]
    chips = "".join(f'<button type="button" data-prompt="{prompt}">{name}</button>' for prompt, name in named)
    return f'<div class="chips" aria-label="Examples">{chips}</div>'


def _scene(inputs: list[gr.components.Component], title: str, scenes: dict[str, Scene], sentence: str) -> None:
    """A tab with a button for each scene."""
    with gr.Tab(title):
        with gr.Row(elem_classes="actions"):
            buttons = {name: gr.Button(name, variant="primary", scale=0, min_width=150) for name in scenes}
        shown = gr.HTML(cards.hint(sentence))
        for name, button in buttons.items():
            button.click(
                _player(scenes[name]),
                inputs,
                [shown, inputs[1]],
                show_progress="hidden",
                api_visibility="private",
            )


def _player(scene: Scene) -> Callable[..., AsyncIterator[tuple[str, int]]]:
    """For Gradio, which reads the parameters: a scene's HTML as it comes, and the seed that it took."""

    async def play(
        prompt: str, seed: float | None, locked: bool, steps: int, model: str, request: gr.Request
    ) -> AsyncIterator[tuple[str, int]]:
        choice = Choice(prompt, chosen_seed(seed, locked), int(steps), model)
        async for text in scene(User(request.client.host), choice):
            yield text, choice.seed

    return play
