"""`fewstep data`: build the data sets that registry packages carry."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Build a captioned data set, as a folder that Hugging Face datasets opens.", no_args_is_help=True
)
Out = Annotated[Path, typer.Option(help="Folder to write.")]


@app.command()
def emoji(
    out: Out,
    size: Annotated[int, typer.Option(min=8, max=512, help="Side of the pictures in pixels.")] = 64,
    styles: Annotated[
        str, typer.Option(help="Comma-separated: fluent-3d, fluent-flat, noto, twemoji; or all.")
    ] = "all",
    packages: Annotated[
        Path | None, typer.Option(help="A node_modules folder with the pinned packages, instead of npm.")
    ] = None,
) -> None:
    """Captioned emoji of up to four permissive styles, from pinned npm packages."""
    from ..training.data.emoji import build_emoji
    from ..training.data.emoji_styles import ALL_STYLES

    chosen = ALL_STYLES if styles == "all" else [style.strip() for style in styles.split(",")]
    _report(out, build_emoji(out, size, chosen, packages))


@app.command()
def fashion(
    out: Out,
    size: Annotated[int, typer.Option(min=28, max=512, help="Side of the pictures in pixels.")] = 32,
) -> None:
    """Fashion-MNIST, from Debian's package dataset-fashion-mnist."""
    from ..training.data.fashion import build_fashion

    _report(out, build_fashion(out, size))


def _report(out: Path, summary: dict[str, Any]) -> None:
    counts = " and ".join(f"{count} {split}" for split, count in summary["counts"].items())
    typer.echo(f"{out}: {counts} pictures, identity {summary['identity'][:12]}")
