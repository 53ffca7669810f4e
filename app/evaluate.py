"""`fewstep evaluate`: how good a model's images are, beside the real ones and beside its teacher's."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.engines import COMPILED, ENGINES, TORCH
from ..runtime.wording import either
from .tables import SCORES, Column, print_table


def evaluate(
    directory: Annotated[Path, typer.Argument(help="Directory of a teacher or a student.")],
    data: Annotated[Path, typer.Option(help="Captioned pictures to compare with.")],
    against: Annotated[
        Path | None, typer.Option(help="Teacher to compare with, at its own setting, on the same prompts and seeds.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, or validation for prompts that training never saw.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="Images to generate.")] = 1000,
    steps: Annotated[int | None, typer.Option(help="Network evaluations; default: the model's own.")] = None,
    sampler: Annotated[str | None, typer.Option(help="For a teacher: ddim, euler, heun, dpm++2m, sde-dpm++2m.")] = None,
    guidance: Annotated[float | None, typer.Option(help="For a teacher: classifier-free guidance scale.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image.")] = 0,
    engine: Annotated[str, typer.Option(help=f"{either(('auto', TORCH, COMPILED, *ENGINES))}.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per engine call.")] = 32,
) -> None:
    """Write FD-EffLite0, KID, precision, recall, coverage, match@1 and diversity into DIRECTORY/evaluation/."""
    from ..runtime.pipeline import Pipeline
    from ..training.evaluation.features import FeatureNetwork
    from ..training.evaluation.model import Setting, evaluate_once, evaluate_open, evaluation_progress
    from ..training.evaluation.split import open_split
    from .bench.contenders import open_teacher

    pipeline = Pipeline.from_pretrained(directory, engine)
    teacher = open_teacher(against) if against else None
    network = FeatureNetwork().to(pipeline.device)
    setting = Setting(count, seed, steps, sampler, guidance, batch_size)
    reference = None
    with evaluation_progress() as report:
        opened = open_split(data, split, network, report)
        entry = evaluate_open(pipeline, opened, network, setting, report)
        if teacher:
            own = (teacher, opened, network, Setting(count, seed, batch_size=batch_size))
            reference = evaluate_once(*own, report)
    _show(entry, reference)


def _show(entry: dict[str, Any], reference: dict[str, Any] | None) -> None:
    """Print the scores, those of the reference with the ratios to them, and those of real pictures."""
    floors = entry["floors"]
    # Of a half's nearest in the other half and of one picture's distance to itself there is nothing to learn.
    real = {**floors["halves"], "match_at_1": None, "diversity": None}
    rows = []
    for column in SCORES:
        row = {"score": column.title, "model": column.cell(entry), "real": column.cell(real)}
        if reference:
            row |= {"reference": column.cell(reference), "ratio": _ratio(entry[column.name], reference[column.name])}
        rows.append(row)
    columns = [Column("score", "score"), Column(_how(entry), "model")]
    if reference:
        columns += [Column(f"teacher, {_how(reference)}", "reference"), Column("ratio", "ratio")]
    print_table([*columns, Column("real halves", "real")], rows)
    typer.echo(_note(entry))


def _how(entry: dict[str, Any]) -> str:
    from ..runtime.wording import in_steps

    return f"{in_steps(entry['steps'])} {entry['sampler']}"


def _ratio(value: float | None, reference: float | None) -> str:
    return f"{value / reference:.2f}" if value is not None and reference is not None and reference > 0 else ""


def _note(entry: dict[str, Any]) -> str:
    floors = entry["floors"]
    notes = [
        f"{entry['images']} images from captions of the {entry['split']} split, seeds from {entry['seed']};"
        f" {entry['real_images']} real ones.",
        f"Real pictures under each other's captions match {floors['shuffled_match_at_1']:.1%},"
        f" and lie {floors['unrelated_distance']:.3f} apart: diversity is far from that if the prompt counts.",
    ]
    if entry["fd"] is None:
        from ..training.evaluation.evaluate import FD_IMAGES

        fewer = min(entry["images"], entry["real_images"])
        notes.append(
            f"FD-EffLite0 is left out: of {fewer} images it would say more about their number than about the model"
            f" (it takes {FD_IMAGES}). Look at match@1, precision and coverage."
        )
    return "\n".join(notes)
