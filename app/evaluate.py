"""`fewstep evaluate`: how good a model's images are, beside the real ones."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    directory: Annotated[Path, typer.Argument(help="Directory of a teacher or a student.")],
    data: Annotated[Path, typer.Option(help="Captioned pictures to compare with.")],
    split: Annotated[str, typer.Option(help="train, or validation for prompts that training never saw.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="Images to generate.")] = 1000,
    steps: Annotated[int | None, typer.Option(help="Network evaluations; default: the model's own.")] = None,
    sampler: Annotated[str | None, typer.Option(help="For a teacher: ddim, euler, heun, dpm++2m, sde-dpm++2m.")] = None,
    guidance: Annotated[float | None, typer.Option(help="For a teacher: classifier-free guidance scale.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image.")] = 0,
    engine: Annotated[str, typer.Option(help="auto, torch, onnx or openvino.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per engine call.")] = 32,
) -> None:
    """Write FD-EffLite0, KID, precision, recall, coverage and match@1 into DIRECTORY/evaluation/."""
    from rich.console import Console
    from rich.table import Table

    from ..training.evaluation.model import evaluate_model

    evaluation = evaluate_model(directory, data, split, count, steps, sampler, guidance, seed, engine, batch_size)
    table = Table("measure", "value", title=f"{directory} on {split}")
    for name, value in asdict(evaluation).items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
