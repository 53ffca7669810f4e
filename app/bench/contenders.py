"""Who is measured against whom, and the clock: every contender in one process, taking turns."""

import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ...runtime.artefact import read_card
from ...runtime.engines import ENGINES
from ...runtime.errors import FewstepError
from ...runtime.pipeline import DEFAULT_TEACHER_STEPS, Pipeline
from ...runtime.wording import in_steps

PROMPTS = ("red rocket", "yellow star", "blue car", "green tree", "orange cat", "pink heart", "round clock", "house")
SAMPLER = "dpm++2m"
BASELINE_SAMPLERS = ("ddim", "dpm++2m")
BASELINE_STEPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Contender:
    """One way to make a picture.

    Args:
        label: for tables.
        pipeline: ready to generate.
        steps: network evaluations.
        sampler: None for a student's own.
        times: filled by `measure`: batch size to seconds a batch, end to end and in the engine alone, one a round.
    """

    label: str
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
    slow = open_teacher(teacher)
    baselines = [(steps, sampler) for sampler in BASELINE_SAMPLERS for steps in BASELINE_STEPS]
    settings = [(DEFAULT_TEACHER_STEPS, SAMPLER), *baselines]
    listed = [Contender(f"teacher, {in_steps(steps)} {sampler}", slow, steps, sampler) for steps, sampler in settings]
    return [*listed, *_students(student)]


def open_teacher(directory: Path) -> Pipeline:
    """Open a teacher.

    Raises:
        FewstepError: the directory is not a teacher.
    """
    if read_card(directory).kind != "teacher":
        raise FewstepError(f"{directory} is a student: give the directory of its teacher")
    return Pipeline.from_pretrained(directory, "torch")


def _students(directory: Path) -> Iterator[Contender]:
    """The student on torch, and on every engine that it was exported to and that runs here."""
    card = read_card(directory)
    if card.kind != "student":
        raise FewstepError(f"{directory} is a teacher: give the directory of its student")
    yield from _on_engine(directory, "torch", card.steps)
    for engine in ENGINES:
        with suppress(FewstepError):
            yield from _on_engine(directory, engine, card.steps)


def _on_engine(directory: Path, engine: str, counts: Sequence[int]) -> Iterator[Contender]:
    pipeline = Pipeline.from_pretrained(directory, engine)
    for steps in counts:
        pipeline.generate(
            PROMPTS[0], steps
        )  # opens the engine for these steps, and fails if it was not exported to them
        yield Contender(f"student, {in_steps(steps)}, {engine}", pipeline, steps)


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
