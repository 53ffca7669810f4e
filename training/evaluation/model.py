"""Evaluates a model directory and leaves the result in it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ...runtime.files import write_json
from ...runtime.pipeline import Pipeline, Result
from ..data.packed import CaptionedImages, load_captioned_images
from .evaluate import Evaluation, Report, evaluate, floors, prompt_positions
from .features import FeatureNetwork
from .reference import Reference, join, load_reference
from .sheet import save_sheet

SHEET_IMAGES = 12


def evaluate_model(
    directory: Path,
    data: Path,
    split: str,
    count: int,
    steps: int | None,
    sampler: str | None,
    guidance: float | None,
    seed: int,
    engine: str,
    batch_size: int,
) -> Evaluation:
    """Evaluate a teacher or a student; write the result with its floors to `DIRECTORY/evaluation/NAME.json`.

    Beside it goes `NAME.png`, a dozen of the real images above what was generated for their captions.
    Args:
        directory: the model.
        data: a captioned data set.
        split: whose captions to generate from; see `open_split` for where match@1 looks.
        count: how many images.
        steps: network evaluations; None, here and in the next two, for the model's own.
        sampler: a name in `SAMPLERS`.
        guidance: scale.
        seed: of the first image.
        engine: as for `Pipeline.from_pretrained`.
        batch_size: images an engine call.

    Raises:
        FewstepError: as `Pipeline`, `load_captioned_images` and `evaluate` do.
    """
    pipeline = Pipeline.from_pretrained(directory, engine)
    network = FeatureNetwork().to(pipeline.device)
    results: list[Result] = []

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        results.append(pipeline.generate(prompts, steps, seeds, 1, guidance, sampler, batch_size))
        return results[-1].arrays

    with _progress() as report:
        images, reference, gallery = open_split(data, split, network, report)
        limits = floors(reference, count)  # before the long part, for it may find too few images
        scores = evaluate(generate, images, reference, gallery, network, count, seed, batch_size, report)
    evaluation = replace(
        scores,
        split=split,
        steps=results[0].steps,
        sampler=sampler or pipeline.card.sampler,
        guidance=pipeline.card.guidance if guidance is None else guidance,
        engine=results[0].engine,
    )
    file = directory / "evaluation" / f"{_name(evaluation)}.json"
    write_json(file, {**evaluation.as_dict(), "floors": asdict(limits)})
    _save_first(images, results, count, file.with_suffix(".png"))
    return evaluation


def open_split(
    data: Path, split: str, network: FeatureNetwork, report: Report
) -> tuple[CaptionedImages, Reference, Reference]:
    """The images of a split, their features, and the gallery in which match@1 looks for the nearest.

    The gallery is the training images and those of the split, so that held-out prompts have their right answer in it.
    """
    splits = {name: load_captioned_images(data, name) for name in dict.fromkeys((split, "train"))}
    references = {
        name: load_reference(
            images, network, data / ".packed" / f"features-{name}.safetensors", partial(report, f"real, {name}")
        )
        for name, images in splits.items()
    }
    return splits[split], references[split], join(list(references.values()))


def _name(evaluation: Evaluation) -> str:
    setting = f"{evaluation.split}-{evaluation.steps}-step-{evaluation.sampler}-guidance-{evaluation.guidance:g}"
    return f"{setting}-{evaluation.engine}-{evaluation.images}-images-seed-{evaluation.seed}"


def _save_first(data: CaptionedImages, results: Sequence[Result], count: int, path: Path) -> None:
    positions = prompt_positions(len(data.captions), count)[:SHEET_IMAGES]
    generated = np.concatenate([result.arrays for result in results])[: len(positions)]
    real = data.images[positions].permute(0, 2, 3, 1).numpy()
    captions = [data.captions[position][0] for position in positions]
    save_sheet({"real": real, "generated": generated}, captions, path)


@contextmanager
def _progress() -> Iterator[Report]:
    """Show one bar a stage."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield report
