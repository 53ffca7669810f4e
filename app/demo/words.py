"""What the shipped models were taught to draw: subjects and styles, as their captions name them."""

from ...training.data.emoji_styles import STYLES

STYLE_WORDS = tuple(STYLES[name].words for name in ("fluent-3d", "fluent-flat"))
"""Of the data that `make train-emoji` trains on."""
SUBJECTS = (
    "red apple",
    "panda",
    "cactus",
    "snowman",
    "butterfly",
    "doughnut",
    "hamburger",
    "robot",
    "lion",
    "avocado",
    "birthday cake",
    "fire engine",
)


def _article(subject: str) -> str:
    return "an" if subject[0] in "aeiou" else "a"


PROMPTS = tuple(
    f"{_article(subject)} {subject}, {STYLE_WORDS[position % 3 == 2]}" for position, subject in enumerate(SUBJECTS)
)
"""Examples, a third of them flat."""


def in_every_style(prompt: str) -> list[str]:
    """The prompt's subject in each of the styles; a style that it names is left out first."""
    subject = prompt.strip()
    for words in STYLE_WORDS:
        subject = subject.removesuffix(words).rstrip().removesuffix(",")
    return [f"{subject}, {words}" if subject else words for words in STYLE_WORDS]
