"""What happens on the page but for the typing: each scene yields its HTML as it comes, and the seed that it took."""

import math
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from ...runtime.errors import FewstepError
from ...runtime.wording import in_steps
from ..serve.context import Context
from ..serve.faults import FaultError
from ..serve.jobs import User
from . import cards
from .drawing import Drawing, draw, request_for
from .rivals import Rival, Rivals
from .words import STYLE_WORDS, in_every_style

SEEDS = 12
"""Pictures of the grid of seeds."""
STYLE_SEEDS = 4
"""Pictures in each style."""
OPENING = "is opened when first compared"


@dataclass(frozen=True)
class Choice:
    """What is set at the top of the page.

    Args:
        prompt: as typed.
        seed: of the first picture.
        steps: network evaluations; None for the model's own.
        model: the student's name.
    """

    prompt: str
    seed: int
    steps: int | None
    model: str


def chosen_seed(seed: float | None, locked: bool) -> int:
    """The seed that is set while it is locked, or else a new one."""
    return int(seed) if locked and seed is not None else secrets.randbelow(10_000)


class Scenes:
    """The scenes of one running page.

    Args:
        context: of the application.
        students: step counts by the names of the students.
        teacher: name of the teacher; None if none is served.
        rivals: the students' engines.
    """

    def __init__(
        self, context: Context, students: Mapping[str, tuple[int, ...]], teacher: str | None, rivals: Rivals
    ) -> None:
        self.context, self.students, self.teacher, self.rivals = context, students, teacher, rivals

    async def both(self, user: User, choice: Choice) -> AsyncIterator[str]:
        """The student's picture, and after it the teacher's, so that neither takes time from the other."""
        if self.teacher is None:
            yield cards.fault("no teacher is served: start with `fewstep demo STUDENT TEACHER`")
            return
        try:
            request = request_for(choice.prompt, choice.seed, choice.steps, choice.model)
            (student,) = await draw(self.context, user, request)
            left = cards.card(student, "Student", _made(student))
            yield cards.row([left, cards.waiting("Teacher", "is drawing")])
            request = request_for(choice.prompt, choice.seed, None, self.teacher)
            (teacher,) = await draw(self.context, user, request)
            right = cards.card(teacher, "Teacher", _made(teacher))
            yield _ratio(student, teacher) + cards.row([left, right])
        except FaultError as error:
            yield cards.fault(error.message)

    async def styles(self, user: User, choice: Choice) -> AsyncIterator[str]:
        """The prompt's subject in every style, some seeds each."""
        prompts = in_every_style(choice.prompt) if choice.prompt.strip() else ""
        async for text in self._grid(user, choice, prompts, STYLE_SEEDS):
            yield text

    async def seeds(self, user: User, choice: Choice) -> AsyncIterator[str]:
        """The prompt with one seed after another."""
        async for text in self._grid(user, choice, choice.prompt, SEEDS):
            yield text

    async def engines(self, user: User, choice: Choice) -> AsyncIterator[str]:
        """One prompt and seed on every engine that is here, one after another."""
        shown: list[str] = []
        try:
            request = request_for(choice.prompt, choice.seed, choice.steps, choice.model)
            names = self.rivals.names(choice.model, choice.steps)
            yield cards.row([cards.waiting(names[0], OPENING)])
            async for rival in self.rivals.compare(user, request):
                shown.append(_rival(rival))
                coming = [cards.waiting(name, OPENING) for name in names[len(shown) :][:1]]
                yield cards.row([*shown, *coming])
            if len(names) == 1:
                command = f"fewstep export {self.rivals.directory(choice.model)} --all"
                yield cards.row(shown) + cards.hint(f"Torch is the only engine here: `{command}` makes others.")
        except (FaultError, FewstepError) as error:
            yield cards.row(shown) + cards.fault(str(error))

    async def _grid(self, user: User, choice: Choice, prompts: str | list[str], count: int) -> AsyncIterator[str]:
        try:
            request = request_for(prompts, choice.seed, choice.steps, choice.model, count)
            drawings = await draw(self.context, user, request)
        except FaultError as error:
            yield cards.fault(error.message)
            return
        tiles = [cards.tile(drawing, _caption(drawing, isinstance(prompts, list))) for drawing in drawings]
        total = drawings[0].milliseconds
        each = (
            f"{len(drawings)} pictures in {cards.milliseconds(total)}, {cards.milliseconds(total / len(drawings))} each"
        )
        yield f'<p class="told">{each}</p>' + cards.row(tiles, "tiles")


def _made(drawing: Drawing) -> list[str]:
    return [drawing.model, f"{in_steps(drawing.steps)} on {drawing.engine}", f"seed {drawing.seed}"]


def _ratio(student: Drawing, teacher: Drawing) -> str:
    times = teacher.milliseconds / student.milliseconds
    return f'<p class="told"><strong>{times:.0f}×</strong> faster than its teacher, same prompt and seed</p>'


def _caption(drawing: Drawing, with_style: bool) -> str:
    style = next((words for words in STYLE_WORDS if with_style and drawing.prompt.endswith(words)), "")
    return f"{style.removesuffix(' style')} {drawing.seed}".strip()


def _rival(rival: Rival) -> str:
    if rival.drawing is None:
        return cards.failed(rival.engine, rival.fault)
    if rival.engine == "torch":
        detail = "the reference"
    elif math.isinf(rival.decibels):
        detail = "equal to torch's, byte for byte"
    else:
        detail = f"PSNR {rival.decibels:.1f} dB against torch"
    return cards.card(rival.drawing, rival.engine, [detail])
