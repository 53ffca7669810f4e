"""`fewstep report`: what the evaluations of several models say, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.artefact import Card, read_card
from ..runtime.errors import FewstepError, require
from ..runtime.files import atomic_path, read_json
from .tables import SCORES, Column, Row, markdown_table, print_table

COMPARABLE = ("data", "feature_identity", "split", "images", "real_images", "seed")
"""Scores are compared only where these agree."""
DRAWING = ("weights", "steps", "sampler", "guidance", "engine")
"""What a benchmark's row and an evaluation must share to speak of the same thing."""
COLUMNS = (
    Column("model", "model"),
    Column("method", "method"),
    Column("steps", "steps"),
    Column("sampler", "sampler"),
    Column("engine", "engine"),
    Column("evaluations", "evaluations"),
    *SCORES,
    Column("iterations", "iterations", "{:,}"),
    Column("minutes", "minutes", "{:.0f}"),
    Column("ms", "milliseconds", "{:.1f}"),
)
LEGEND = """\
*evaluations*: of the network, for one image; guidance doubles those of a teacher. *diversity*: mean distance between
images of one prompt, as 1 - cosine of their features. *iterations*, *minutes*: of the training of this model alone.
*ms*: prompt to PNG, one image, where a benchmark measured it. A blank was not measured, or would mean nothing at so few
images.
"""


def report(
    directories: Annotated[list[Path], typer.Argument(help="Models that `fewstep evaluate` has evaluated.")],
    bench: Annotated[Path | None, typer.Option(help="A bench.json, for the milliseconds.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.md and its pictures.")] = None,
) -> None:
    """Compare students, step counts and teachers by their evaluations: a table and a Pareto picture."""
    if out:
        require("matplotlib", "eval")
    timings = _timings(bench) if bench else {}
    rows = [row for directory in directories for row in _rows(directory, timings)]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in COMPARABLE), []).append(row)
    for group in groups.values():
        group.sort(key=lambda row: (row["kind"] == "student", row["model"], row["sampler"], row["evaluations"]))
        print_table(COLUMNS, group, _title(group[0]))
    if out:
        _write(list(groups.values()), out)


def network_evaluations(kind: str, steps: int, sampler: str, guidance: float) -> int:
    """Network evaluations an image; guidance doubles a teacher's, and is built into a student."""
    from ..runtime.samplers import get_sampler

    runs = get_sampler(sampler).evaluations(steps)
    return 2 * runs if kind == "teacher" and guidance != 1 else runs


def training_cost(directory: Path) -> dict[str, float]:
    """Iterations and minutes of a model's training, all stages together; nothing if it left no curve behind.

    A training of one stage writes `training/curve.jsonl`; one of several, a folder a stage.
    """
    from ..training.recorder import read_curve

    folder = directory / "training"
    whole = folder / "curve.jsonl"
    curves = [whole] if whole.is_file() else sorted(folder.glob("*/curve.jsonl"))
    ends = [curve[-1] for curve in map(read_curve, (file.parent for file in curves)) if curve]
    if not ends:
        return {}
    return {"iterations": sum(end["step"] for end in ends), "minutes": sum(end["seconds"] for end in ends) / 60}


def _rows(directory: Path, timings: dict[tuple[Any, ...], float]) -> list[dict[str, Any]]:
    """The evaluations of a model as it is now."""
    card, cost = read_card(directory), training_cost(directory)
    entries = [_read(file, card) for file in sorted((directory / "evaluation").glob("*.json"))]
    current = [entry for entry in entries if entry["weights"] == card.weights]
    if not current:
        raise FewstepError(
            f"{directory} holds no evaluation of its weights: run `fewstep evaluate {directory} --data DIR`"
        )
    rows = []
    for entry in current:
        more = {
            "model": directory.name,
            "method": card.method,
            "kind": card.kind,
            "evaluations": network_evaluations(card.kind, entry["steps"], entry["sampler"], entry["guidance"]),
            "series": f"{directory.name}, {entry['sampler']}" if card.kind == "teacher" else directory.name,
            "note": str(entry["steps"]),
            "milliseconds": timings.get(_key(entry)),
        }
        rows.append(entry | cost | more)
    return rows


def _read(file: Path, card: Card) -> dict[str, Any]:
    entry = read_json(file)
    if not isinstance(entry, dict) or not {*COMPARABLE, *DRAWING} - {"weights"} <= entry.keys():
        raise FewstepError(f"{file} is not an evaluation: remove it, or evaluate the model again")
    return {"weights": card.weights, **entry}  # the first evaluations did not say


def _timings(bench: Path) -> dict[tuple[Any, ...], float]:
    try:
        rows = [{"weights": None, **row} for row in read_json(bench)["rows"]]
        return {_key(row): row["milliseconds_batch_1"] for row in rows}
    except (KeyError, TypeError) as error:
        raise FewstepError(f"{bench} is not what this version of `fewstep bench` writes: run it again") from error


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in DRAWING)


def _title(row: Row) -> str:
    return (
        f"{row['images']} images from captions of the {row['split']} split, data {row['data'][:8]}, seed {row['seed']}"
    )


def _write(groups: Sequence[Sequence[Row]], out: Path) -> None:
    from .pareto import save_pareto

    text = ["# Report\n"]
    for number, group in enumerate(groups, 1):
        picture = f"pareto-{number}.png"
        save_pareto(group, "evaluations", "network evaluations an image", out / picture)
        text.append(f"## {_title(group[0])}\n\n{markdown_table(COLUMNS, group)}\n![quality against cost]({picture})\n")
    with atomic_path(out / "report.md") as temporary:
        temporary.write_text("\n".join([*text, LEGEND]), encoding="utf-8")
