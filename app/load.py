"""`fewstep load`: requests that arrive as people do, whether or not the server keeps up, and what became of them."""

import asyncio
import contextlib
import http.client
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import typer

from ..runtime.errors import FewstepError, require
from ..runtime.files import atomic_path, write_json
from .bench.worker import SUBJECTS
from .machine import machine
from .tables import Column, markdown_table, print_table

if TYPE_CHECKING:
    import aiohttp

COLUMNS = (
    Column("asked, images/s", "rate", "{:.1f}"),
    Column("drawn, images/s", "images_per_second", "{:.1f}"),
    Column("p50, ms", "p50", "{:.1f}"),
    Column("p95, ms", "p95", "{:.1f}"),
    Column("p99, ms", "p99", "{:.1f}"),
    Column("requests", "requests"),
    Column("served", "served"),
    Column("429", "refused"),
    Column("other", "failed"),
)


@dataclass
class Outcome:
    """What became of the requests of one load.

    Args:
        seconds: from each served request's arrival, as planned, to the end of its answer.
        statuses: of all; 0 where the connection failed.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)


def load(
    url: Annotated[str, typer.Argument(help="The server, such as http://127.0.0.1:8000.")],
    rates: Annotated[str, typer.Option(help="Images a second, one load after another: 10,20,40.")] = "10",
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each load.")] = 30,
    images: Annotated[int, typer.Option(min=1, max=16, help="Images a request.")] = 1,
    trace: Annotated[
        Path | None, typer.Option(help="Arrivals instead of --rates: a file with seconds from the start, one a line.")
    ] = None,
    model: Annotated[str, typer.Option(help="Which model; default: the server's first.")] = "",
    steps: Annotated[int, typer.Option(min=0, help="Network evaluations; 0: the model's own.")] = 0,
    key: Annotated[str, typer.Option(envvar="FEWSTEP_API_KEY", help="API key.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for load.json, load.md and load.png.")] = None,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
) -> None:
    """Send requests at random moments (a Poisson process) and report throughput, latency and refusals.

    The load is open: what the server does not answer in time does not hold up what comes next, and latency counts from
    the moment at which a request should have been sent.
    """
    require("aiohttp", "serve")
    body: dict[str, Any] = {"n": images}
    body |= {"model": model} if model else {}
    body |= {"num_inference_steps": steps} if steps else {}
    plans = [_read(trace)] if trace else [list(poisson(rate / images, seconds, seed)) for rate in _rates(rates)]
    if not all(plans):
        raise FewstepError("no request falls into that time: give higher --rates or more --seconds")
    _require_server(url)
    rows = []
    for arrivals in plans:
        outcome, took = asyncio.run(send(url.rstrip("/") + "/v1/images/generations", body, arrivals, key))
        rows.append(summary(outcome, took, images, len(arrivals) * images / (arrivals[-1] if trace else seconds)))
    print_table(COLUMNS, rows)
    if out:
        write_json(out / "load.json", {"machine": machine(), "url": url, "body": body, "rows": rows})
        with atomic_path(out / "load.md") as temporary:
            temporary.write_text(markdown_table(COLUMNS, rows), encoding="utf-8")
        if len(rows) > 1:
            _draw(rows, out / "load.png")


def _require_server(url: str) -> None:
    """Refuse to measure a server that is not there; what it answers is its own affair."""
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    try:
        place = urlsplit(url)
        with contextlib.closing(kinds[place.scheme](place.netloc, timeout=10)) as connection:
            connection.request("GET", "/health")
            connection.getresponse()
    except (KeyError, ValueError, http.client.InvalidURL) as error:
        raise FewstepError(f"{url} is no address of a server: give one such as http://127.0.0.1:8000") from error
    except (OSError, http.client.HTTPException) as error:
        raise FewstepError(f"no server answers at {url}: start one with `fewstep serve`") from error


def poisson(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Moments of a Poisson process, in seconds from its start."""
    gaps, now = np.random.default_rng(seed), 0.0
    while (now := now + gaps.exponential(1 / rate)) < seconds:
        yield now


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1e6 for rate in rates):
        raise FewstepError(f"--rates is {text!r}: give images a second, such as 10,20,40")
    return rates


def _read(trace: Path) -> list[float]:
    try:
        moments = sorted(float(line) for line in trace.read_text(encoding="utf-8").split())
    except OSError as error:
        raise FewstepError(f"cannot read {trace}: {error.strerror}") from error
    except ValueError as error:
        raise FewstepError(f"{trace} is no trace ({error}): give seconds from the start, one a line") from error
    if not moments or moments[0] < 0 or not 0 < moments[-1] < math.inf:
        raise FewstepError(f"{trace} is no trace: give seconds from the start, one a line, not all of them 0")
    return moments


async def send(url: str, body: dict[str, Any], arrivals: Sequence[float], key: str) -> tuple[Outcome, float]:
    """Send a request at each moment; the outcome, and the seconds until the last answer."""
    import aiohttp
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    outcome, begin = Outcome(), time.perf_counter()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connector, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=300)
    bar = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=patience) as session:
        with bar as progress:
            task = progress.add_task("", total=len(arrivals))
            requests = []
            for number, moment in enumerate(arrivals):
                await asyncio.sleep(begin + moment - time.perf_counter())
                prompt = f"a {SUBJECTS[number % len(SUBJECTS)]} {number}, fluent 3d style"
                asking = _ask(session, url, {"prompt": prompt, "seed": number, **body}, begin + moment, outcome)
                requests.append(asyncio.create_task(asking))
                progress.update(task, completed=number + 1)
            await asyncio.gather(*requests)
    return outcome, time.perf_counter() - begin


async def _ask(
    session: "aiohttp.ClientSession", url: str, body: dict[str, Any], planned: float, outcome: Outcome
) -> None:
    import aiohttp

    try:
        async with session.post(url, json=body) as answer:
            await answer.read()
            outcome.statuses[answer.status] += 1
            if answer.status == 200:
                outcome.seconds.append(time.perf_counter() - planned)
    except (aiohttp.ClientError, TimeoutError):
        outcome.statuses[0] += 1


def summary(outcome: Outcome, seconds: float, images: int, rate: float) -> dict[str, Any]:
    """A row for `COLUMNS`.

    Args:
        outcome: of one load.
        seconds: from its start to its last answer.
        images: of a request.
        rate: images a second that were asked for.
    """
    served, total = len(outcome.seconds), sum(outcome.statuses.values())
    refused = outcome.statuses[429]
    latencies = [1000 * value for value in outcome.seconds]
    cuts = quantiles(latencies, n=100, method="inclusive") if served > 1 else latencies * 99
    return {
        "rate": round(rate, 2),
        "images_per_second": round(served * images / seconds, 2),
        "p50": round(median(latencies), 2) if latencies else None,
        "p95": round(cuts[94], 2) if latencies else None,
        "p99": round(cuts[98], 2) if latencies else None,
        "requests": total,
        "served": served,
        "refused": refused,
        "failed": total - served - refused,
        "statuses": {str(status): count for status, count in sorted(outcome.statuses.items())},
    }


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Latency and throughput against load."""
    require("matplotlib", "eval")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    rates = [row["rate"] for row in rows]
    for name in ("p50", "p95", "p99"):
        latency.plot(rates, [row[name] for row in rows], marker="o", label=name)
    latency.set(xlabel="images/s asked", ylabel="ms", yscale="log", title="latency of what was served")
    latency.legend(frameon=False)
    throughput.plot(rates, rates, color="lightgrey", label="asked")
    throughput.plot(rates, [row["images_per_second"] for row in rows], marker="o", label="drawn")
    throughput.set(xlabel="images/s asked", ylabel="images/s", title="throughput")
    throughput.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
