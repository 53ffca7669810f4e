"""Our server beside those that people write: one request, eight clients who always ask, and more than can be drawn.

All have the same student on the same machine, one after another, and encode every request's prompt: the plain handler
and Ray's deployment by diffusers' SanaPipeline, ours by its own engine and, so that the servers alone are compared, by
torch, as `auto` opens a student that was never exported. Peers have no limit of waiting; ours has one. A request that
is not answered within two seconds counts as lost, as its reader would have it. All are asked for three times what the
first of them can draw.
"""

import argparse
import asyncio
import atexit
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import aiohttp

from fewstep.app.load import poisson
from fewstep.app.machine import machine
from fewstep.app.tables import Column, markdown_table, print_table
from fewstep.runtime.files import atomic_path, write_json

PATH = "/v1/images/generations"
CLIENTS, PATIENCE, WAIT = 8, 2.0, 1.5
PEERS = Path(__file__).with_name("serving_peer_apps.py")
FEWSTEP = [sys.executable, "-P", "-c", "from fewstep.app.cli import main; main()", "serve", "--wait", str(WAIT)]
SERVERS = {
    "fewstep": lambda model, port: [*FEWSTEP, model, "--port", port],
    "fewstep, torch": lambda model, port: [*FEWSTEP, without_exports(model), "--port", port],
    "FastAPI, threads": lambda model, port: [sys.executable, "-P", str(PEERS), "threads", model, port],
    "FastAPI, async def": lambda model, port: [sys.executable, "-P", str(PEERS), "async", model, port],
    "Ray Serve": lambda model, port: [sys.executable, "-P", str(PEERS), "ray", model, port],
}
COLUMNS = (
    Column("server", "server"),
    Column("one request, p50 ms", "p50", "{:.1f}"),
    Column("p95 ms", "p95", "{:.1f}"),
    Column("images/s, 8 clients", "throughput", "{:.1f}"),
    Column("overload, asked/s", "asked", "{:.1f}"),
    Column("answered in 2 s", "answered", "{:.0%}"),
    Column("refused in 2 s", "refused", "{:.0%}"),
    Column("neither", "lost", "{:.0%}"),
)


def without_exports(model: str) -> str:
    """A copy of a student that nobody exported; it goes with this process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return str(shutil.copytree(model, folder / Path(model).name, ignore=shutil.ignore_patterns("engines")))


@asynccontextmanager
async def serving(name: str, model: Path) -> AsyncIterator[str]:
    """A server on a free port, once it has answered."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    # Ray has its processes import from the folder that it is started in: the repository's would pass for packages.
    command, silent = SERVERS[name](str(model.resolve()), port), subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=silent, stderr=silent, env=environment, cwd=sys.prefix)
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as session:
            while await ask(session, url, "a rocket", 60) != 200:
                if process.poll() is not None:
                    raise SystemExit(f"{name} did not start")
                await asyncio.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:  # it would first work off all that nobody waits for any longer
            process.kill()
            process.wait()


async def ask(session: aiohttp.ClientSession, url: str, prompt: str, patience: float) -> int:
    """The status of one request; 0 if there was no answer in time."""
    try:
        timeout = aiohttp.ClientTimeout(patience)
        async with session.post(url + PATH, json={"prompt": prompt, "seed": 1}, timeout=timeout) as answer:
            await answer.read()
            return answer.status
    except (aiohttp.ClientError, TimeoutError):
        return 0


async def latency(session: aiohttp.ClientSession, url: str, rounds: int) -> list[float]:
    """Milliseconds of each of so many requests, one after another."""
    found = []
    for number in range(-3, rounds):
        start = time.perf_counter()
        assert await ask(session, url, f"a rocket {number}, fluent 3d style", 60) == 200
        if number >= 0:
            found.append(1000 * (time.perf_counter() - start))
    return found


async def throughput(session: aiohttp.ClientSession, url: str, seconds: float) -> float:
    """Images a second that clients get who always ask."""
    begin, done = time.perf_counter(), 0

    async def client(number: int) -> None:
        nonlocal done
        while time.perf_counter() < begin + seconds:
            status = await ask(session, url, f"a rocket {number} {done}, fluent 3d style", 60)
            done += status == 200

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return done / (time.perf_counter() - begin)


async def overload(session: aiohttp.ClientSession, url: str, rate: float, seconds: float) -> dict[str, float]:
    """What share of requests that come at random moments was answered, refused or neither while its client waited."""
    begin, arrivals, asking = time.perf_counter(), list(poisson(rate, seconds, seed=0)), []
    for number, moment in enumerate(arrivals):
        await asyncio.sleep(begin + moment - time.perf_counter())
        prompt = f"a rocket {number}, fluent 3d style"
        asking.append(asyncio.create_task(ask(session, url, prompt, PATIENCE)))
    statuses = await asyncio.gather(*asking)
    answered, refused = statuses.count(200), statuses.count(429) + statuses.count(503)
    total = len(statuses)
    return {"answered": answered / total, "refused": refused / total, "lost": (total - answered - refused) / total}


async def measure(name: str, model: Path, rounds: int, seconds: float, asked: float | None) -> dict[str, Any]:
    """A row for `COLUMNS`; overload is `asked` images a second, or three times what this server draws."""
    connector = aiohttp.TCPConnector(limit=0)
    async with serving(name, model) as url, aiohttp.ClientSession(connector=connector) as session:
        single = await latency(session, url, rounds)
        drawn = await throughput(session, url, seconds)
        asked = asked or 3 * drawn
        fate = await overload(session, url, asked, seconds)
    cuts = quantiles(single, n=20, method="inclusive")
    return {"server": name, "p50": cuts[9], "p95": cuts[18], "throughput": drawn, "asked": asked, **fate}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/emoji-student"))
    parser.add_argument("--servers", default=";".join(SERVERS), help="separated by semicolons")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0, help="of throughput, and of overload")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in re.split(r";\s*", options.servers):
        asked = rows[0]["asked"] if rows else None
        rows.append(asyncio.run(measure(name, options.model, options.rounds, options.seconds, asked)))
    print_table(COLUMNS, rows)
    write_json(options.out, {"machine": machine(), "patience_seconds": PATIENCE, "clients": CLIENTS, "rows": rows})
    with atomic_path(options.out.with_suffix(".md")) as temporary:
        temporary.write_text(markdown_table(COLUMNS, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
