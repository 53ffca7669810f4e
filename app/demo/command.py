"""`fewstep demo`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ...runtime.artefact import read_card
from ...runtime.errors import FewstepError, require
from ..models import SHIPPED_STUDENT, SHIPPED_TEACHER
from ..serve.command import named, require_server, run

BENCHMARK = Path(__file__).resolve().parent.parent.parent / "results" / "bench.json"


def demo(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Model directories, or NAME=DIR.", show_default="the shipped student and its teacher"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address of this machine for itself.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    engine: Annotated[str, typer.Option(help="Of the students: auto, torch, or one that was exported.")] = "auto",
    bench: Annotated[
        Path, typer.Option(help="What `fewstep bench` wrote.", show_default="results/bench.json")
    ] = BENCHMARK,
) -> None:
    """Show models on a page for this machine's browser: type and see, beside the teacher, on every engine."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    require_server()
    require("gradio", "demo")
    from ..serve.keys import is_loopback
    from ..serve.server import LOOPBACK_NAMES, ServerSettings, create_app
    from ..serve.worker import ModelSettings
    from .application import mount

    if not is_loopback(host):
        raise FewstepError(
            f"{host} is reached from other machines, and the page asks for no key: leave --host out and come through "
            f"`ssh -L {port}:127.0.0.1:{port} THIS-MACHINE`, or use `fewstep serve --keys`"
        )
    if bench != BENCHMARK and not bench.is_file():
        raise FewstepError(f"there is no {bench}: `fewstep bench --data DIR --out FOLDER` writes FOLDER/bench.json")
    given = named(models or [str(SHIPPED_STUDENT), str(SHIPPED_TEACHER)])
    cards = {name: read_card(path) for name, path in given.items()}
    if not any(card.kind == "student" for card in cards.values()):
        raise FewstepError(f"{' and '.join(given)} is no student: give the directory of one, and of its teacher")
    # A teacher is slow, and draws one picture at a time here: it need not be warm for batches.
    settings = {
        name: ModelSettings(path, engine) if cards[name].kind == "student" else ModelSettings(path, largest_batch=1)
        for name, path in sorted(given.items(), key=lambda item: cards[item[0]].kind != "student")
    }
    app = create_app(ServerSettings(models=settings, hosts=LOOPBACK_NAMES))
    mount(app, cards, bench)
    run(app, host, port)
