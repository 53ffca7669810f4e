"""Evaluates an open model and leaves the result in its directory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ...runtime.errors import FewstepError
from ...runtime.files import read_json, write_json
from ...runtime.pipeline import DEFAULT_TEACHER_STEPS, Pipeline
from .evaluate import evaluate, floors
from .features import FeatureNetwork
from .sheet import save_sheet
from .split import Report, Split, prompt_positions

SHEET_IMAGES = 12
EVALUATION = "evaluation"
"""Folder of a model's results."""


@dataclass(frozen=True)
class Setting:
    """What a model is asked for.

    Args:
        count: images.
        seed: of the first image; the others count up from it.
        steps: network evaluations; None, here and in the next two, for the model's own.
        sampler: a name in `SAMPLERS`, for a teacher.
        guidance: scale, for a teacher.
        batch_size: images an engine call.
    """

    count: int = 1000
    seed: int = 0
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    batch_size: int = 32


def evaluate_open(
    pipeline: Pipeline, split: Split, network: FeatureNetwork, setting: Setting, report: Report | None = None
) -> dict[str, Any]:
    """Evaluate a teacher or a student; write the result to `DIRECTORY/evaluation/NAME.json` and return it.

    Beside it goes `NAME.png`, a dozen of the real images above what was generated for their captions.

    Args:
        pipeline: the model.
        split: from `open_split`, which also serves other models.
        network: what opened the split.
        setting: what to generate.
        report: follows the stages, which begin with the model's kind.

    Returns:
        The fields of `Evaluation`, those of `drawing`, and `floors`.

    Raises:
        FewstepError: as `Pipeline.generate` and `evaluate` do.
    """
    follow = report or (lambda stage, done, total: None)
    first: list[npt.NDArray[np.uint8]] = []
    engines: list[str] = []

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        result = pipeline.generate(
            prompts, setting.steps, seeds, 1, setting.guidance, setting.sampler, setting.batch_size
        )
        first.extend(result.arrays[: SHEET_IMAGES - len(first)])
        engines.append(result.engine)
        return result.arrays

    limits = floors(split, setting.count)  # before the long part, for it may find too few images
    scores = evaluate(
        generate,
        split,
        network,
        setting.count,
        setting.seed,
        setting.batch_size,
        lambda stage, done, total: follow(f"{pipeline.card.kind}, {stage}", done, total),
    )
    entry = {**asdict(scores), **drawing(pipeline, setting), "engine": engines[0], "floors": asdict(limits)}
    file = _file(pipeline, entry)
    write_json(file, entry)
    _save_sheet(split, np.stack(first[: setting.count]), file.with_suffix(".png"))
    return entry


def evaluate_once(
    pipeline: Pipeline, split: Split, network: FeatureNetwork, setting: Setting, report: Report | None = None
) -> dict[str, Any]:
    """What `evaluate_open` found before for the same weights, data and setting, or finds now."""
    found = find_evaluation(pipeline, split, network, setting)
    return found or evaluate_open(pipeline, split, network, setting, report)


def find_evaluation(
    pipeline: Pipeline, split: Split, network: FeatureNetwork, setting: Setting
) -> dict[str, Any] | None:
    """What `evaluate_open` left behind for these weights, data, features and setting; None if it did not run."""
    wanted = {
        **drawing(pipeline, setting),
        "split": split.name,
        "data": split.images.identity,
        "feature_identity": network.identity,
        "images": setting.count,
        "seed": setting.seed,
    }
    try:
        found: dict[str, Any] = read_json(_file(pipeline, wanted))
    except FewstepError:  # absent or damaged: to be evaluated
        return None
    return found if all(found.get(name) == value for name, value in wanted.items()) else None


def drawing(pipeline: Pipeline, setting: Setting) -> dict[str, Any]:
    """Which network draws, and how: `weights`, `steps`, `sampler`, `guidance` and `engine`."""
    card = pipeline.card
    return {
        "weights": card.weights,
        "steps": setting.steps or (card.steps[0] if card.steps else DEFAULT_TEACHER_STEPS),
        "sampler": setting.sampler or card.sampler,
        "guidance": card.guidance if setting.guidance is None else setting.guidance,
        "engine": pipeline.engine_name,
    }


def _file(pipeline: Pipeline, entry: dict[str, Any]) -> Path:
    how = f"{entry['split']}-{entry['steps']}-step-{entry['sampler']}-guidance-{entry['guidance']:g}"
    name = f"{how}-{entry['engine']}-{entry['images']}-images-seed-{entry['seed']}.json"
    return pipeline.directory / EVALUATION / name


def _save_sheet(split: Split, generated: npt.NDArray[np.uint8], path: Path) -> None:
    data = split.images
    positions = prompt_positions(len(data.captions), len(generated))
    real = data.images[positions].permute(0, 2, 3, 1).numpy()
    save_sheet({"real": real, "generated": generated}, [data.captions[position][0] for position in positions], path)


@contextmanager
def evaluation_progress() -> Iterator[Report]:
    """Show one bar a stage."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield report
