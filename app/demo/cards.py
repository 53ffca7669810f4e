"""HTML of pictures and sentences; whatever came from outside is escaped."""

import base64
import html
import re
from collections.abc import Sequence

from .drawing import Drawing


def escaped(value: str) -> str:
    """For HTML that goes through Gradio's templates, in which `$` and braces have a meaning as well."""
    text = html.escape(value)
    return "".join(f"&#{ord(character)};" if character in "${}`\\" else character for character in text)


def fault(sentence: str) -> str:
    """One sentence that says what went wrong."""
    sentence = sentence[:1].upper() + sentence[1:]
    return f'<p class="fault" role="alert">{escaped(sentence.rstrip("."))}.</p>'


def hint(sentence: str) -> str:
    """One calm sentence where pictures will be."""
    return f'<p class="hint">{escaped(sentence)}</p>'


def milliseconds(value: float) -> str:
    """Two digits where a tenth matters, seconds where milliseconds do not."""
    if value >= 10_000:
        return f"{value / 1000:.1f}&nbsp;s"
    return f"{value:,.1f}&nbsp;ms" if value < 100 else f"{value:,.0f}&nbsp;ms"


def card(drawing: Drawing, title: str, details: Sequence[str]) -> str:
    """A picture under a title, with its time and details below."""
    lines = "".join(f"<li>{escaped(line)}</li>" for line in details)
    return (
        f'<figure class="card"><figcaption>{escaped(title)}</figcaption>{picture(drawing)}'
        f'<p class="value">{milliseconds(drawing.milliseconds)}</p><ul>{lines}</ul></figure>'
    )


def waiting(title: str, sentence: str) -> str:
    """A card for a picture that is being drawn; the page's script runs its clock."""
    return (
        f'<figure class="card"><figcaption>{escaped(title)}</figcaption><div class="frame empty"></div>'
        f'<p class="value clock" role="timer">0&nbsp;ms</p><ul><li>{escaped(sentence)}</li></ul></figure>'
    )


def failed(title: str, sentence: str) -> str:
    """A card for a picture that did not come."""
    return f'<figure class="card"><figcaption>{escaped(title)}</figcaption>{fault(sentence)}</figure>'


def tile(drawing: Drawing, caption: str) -> str:
    """A small picture of a grid."""
    return f'<figure class="tile">{picture(drawing)}<figcaption>{escaped(caption)}</figcaption></figure>'


def row(cards: Sequence[str], name: str = "cards") -> str:
    """Cards side by side, as many as there is room for."""
    return f'<div class="{name}">{"".join(cards)}</div>'


def picture(drawing: Drawing) -> str:
    """The PNG itself, metadata and all, in a button that saves it."""
    data = base64.b64encode(drawing.file).decode()
    height, width, _ = drawing.pixels.shape
    name = file_name(drawing.prompt, drawing.seed)
    return (
        f'<button class="frame" type="button" data-file="{name}" title="Save {name}">'
        f'<img alt="{escaped(drawing.prompt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
        "</button>"
    )


def file_name(prompt: str, seed: int) -> str:
    """Such as `a-red-apple-7.png`."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-")
    return f"{words or 'picture'}-{seed}.png"
