"""Who is measured against whom, and the clock: every contender in one process, taking turns."""

import io
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.artefact import read_card
from ..runtime.engines import ENGINES, open_engines
from ..runtime.errors import FewstepError
from ..runtime.pipeline import DEFAULT_TEACHER_STEPS, Pipeline

PROMPTS = ("red rocket", "yellow star", "blue car", "green tree", "orange cat", "pink heart", "round clock", "house")
SAMPLER = "dpm++2m"
BASELINE_SAMPLERS = ("ddim", "dpm++2m")
BASELINE_STEPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Contender:
    """One way to make a picture.

    Args:
        label: for tables.
        directory: of its model.
        pipeline: ready to generate.
        steps: network evaluations.
        sampler: None for a student's own.
        times: filled by `measure`: batch size to seconds a batch, end to end and in the engine alone, one a round.
    """

    label: str
    directory: Path
    pipeline: Pipeline
    steps: int
    sampler: str | None = None
    times: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def median(self, batch: int) -> tuple[float, float]:
        """Median milliseconds a batch: prompt to PNG, and the engine's call alone."""
        end_to_end, engine = zip(*self.times[batch], strict=True)
        return 1000 * statistics.median(end_to_end), 1000 * statistics.median(engine)


def contenders(student: Path, teacher: Path) -> list[Contender]:
    """The reference (teacher, 50 steps), the teacher's training-free few steps, the student on every engine.

    Raises:
        FewstepError: one of the directories is not a model of its kind.
    """
    slow = Pipeline.from_pretrained(teacher, "torch")
    if slow.card.kind != "teacher":
        raise FewstepError(f"{teacher} is a student: give the directory of its teacher")
    reference = f"teacher, {in_steps(DEFAULT_TEACHER_STEPS)} {SAMPLER}"
    listed = [Contender(reference, teacher, slow, DEFAULT_TEACHER_STEPS, SAMPLER)]
    for sampler in BASELINE_SAMPLERS:
        for steps in BASELINE_STEPS:
            listed.append(Contender(f"teacher, {in_steps(steps)} {sampler}", teacher, slow, steps, sampler))
    for engine, steps in present_engines(student):
        quick = Pipeline.from_pretrained(student, engine)
        listed.append(Contender(f"student, {in_steps(steps)}, {engine}", student, quick, steps))
    return listed


def in_steps(steps: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{steps} step{'s' * (steps != 1)}"


def present_engines(student: Path) -> list[tuple[str, int]]:
    """Torch, and every engine that the student was exported to and that can be opened here, with its step counts.

    Raises:
        FewstepError: the directory is not a student.
    """
    card = read_card(student)
    if card.kind != "student":
        raise FewstepError(f"{student} is a teacher: give the directory of its student")
    usable = [("torch", steps) for steps in card.steps]
    for engine in ENGINES:
        for steps in card.steps:
            with suppress(FewstepError):
                open_engines(student, engine, steps, card.weights)
                usable.append((engine, steps))
    return usable


def measure(
    listed: Sequence[Contender], batches: Sequence[int], rounds: int, report: Callable[[int, int], None]
) -> None:
    """Time every contender `rounds` times at every batch size, taking turns, after one warm-up each.

    Every round has prompts of its own, so that nothing can be remembered from the round before.

    Args:
        listed: contenders; their `times` are filled.
        batches: images a call.
        rounds: measurements each.
        report: called with (calls done, calls in all).
    """
    total, done = len(listed) * len(batches) * (rounds + 1), 0
    for batch in batches:
        for round_number in range(-1, rounds):
            for contender in listed:
                seconds = _time_once(contender, batch, round_number)
                if round_number >= 0:
                    contender.times.setdefault(batch, []).append(seconds)
                done += 1
                report(done, total)


def _time_once(contender: Contender, batch: int, round_number: int) -> tuple[float, float]:
    prompts = [f"a {PROMPTS[index % len(PROMPTS)]} {round_number}, fluent 3d style" for index in range(batch)]
    begin = time.perf_counter()
    result = contender.pipeline.generate(
        prompts, steps=contender.steps, sampler=contender.sampler, seed=max(0, round_number), batch_size=batch
    )
    for image in result.images:
        image.save(io.BytesIO(), format="PNG", compress_level=1)
    return time.perf_counter() - begin, result.timings["network"]
