"""What a server adds to its engine: latency of one request, throughput when saturated, and three times that load.

The server and a pipeline in this process have the same model, engine and threads, and take turns; the clients share the
machine with both. Overload is what `fewstep load` sends; memory is that of the server and its workers.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import count
from operator import sub
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from fewstep.app.load import poisson, send, summary
from fewstep.app.machine import machine
from fewstep.runtime import Pipeline
from fewstep.runtime.files import write_json

PATH = "/v1/images/generations"
LARGEST_BATCH, CLIENTS, WAIT = 8, 32, 2.0
TURNS = 15
"""Of the measurement of throughput."""
_numbers = count()
SECONDS_BETWEEN_LOOKS = 5.0


@contextmanager
def serving(model: Path, engine: str) -> Iterator[tuple[str, int]]:
    """A server on a free port: its address, and its process."""
    options = ["--port", "0", "--engine", engine, "--largest-batch", str(LARGEST_BATCH), "--wait", str(WAIT)]
    command = [sys.executable, "-P", "-c", "from fewstep.app.cli import main; main()", "serve", str(model), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"on (http://\S+)", process.stdout.readline())
        if not found:
            raise SystemExit("the server did not start")
        try:
            yield found[1], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def latency(url: str, pipeline: Pipeline, rounds: int) -> dict[str, Any]:
    """Median milliseconds of one image in this process and over HTTP, in turns, each with a prompt of its own.

    One client does no more than write the request's bytes to a socket and read the answer's, so that it shows what the
    server takes; the other is the standard library's, which parses headers, too.
    """
    address = urlsplit(url)
    with (
        socket.create_connection((address.hostname, address.port)) as connection,
        closing(HTTPConnection(address.netloc)) as client,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways: dict[str, Callable[[str], object]] = {
            "pipeline": lambda prompt: pipeline.generate(prompt, seed=1),
            "socket": lambda prompt: ask_by_socket(connection, body_for(prompt)),
            "http_client": lambda prompt: ask_by_client(client, body_for(prompt)),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        order = random.Random(0)
        for number in range(-3, rounds):
            for name, ask in order.sample(sorted(ways.items()), len(ways)):
                prompt, start = new_prompt(), time.perf_counter()
                ask(prompt)
                if number >= 0:
                    taken[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {
            "milliseconds": round(median(values), 3),
            "more_than_pipeline": round(median(map(sub, values, taken["pipeline"])), 3),
        }
        for name, values in taken.items()
    }


def body_for(prompt: str) -> bytes:
    """Of a request for one image."""
    return json.dumps({"prompt": prompt, "seed": 1}).encode()


def ask_by_socket(connection: socket.socket, body: bytes) -> None:
    """Write a request, and read all of the answer."""
    connection.sendall(request_of(body))
    answer = bytearray()
    while not (found := re.search(rb"content-length: (\d+)\r\n.*?\r\n\r\n", answer, re.DOTALL)):
        answer += connection.recv(65536)
    while len(answer) < found.end() + int(found[1]):
        answer += connection.recv(65536)
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"a request was answered {answer.splitlines()[0].decode()}")


def request_of(body: bytes) -> bytes:
    """A request as it is sent."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


def ask_by_client(client: HTTPConnection, body: bytes) -> None:
    """The same, by the standard library's client."""
    client.request("POST", PATH, body, {"Content-Type": "application/json"})
    answer = client.getresponse()
    answer.read()
    if answer.status != 200:
        raise SystemExit(f"a request was answered {answer.status}")


def new_prompt() -> str:
    """One that was not given before, which would spare its encoding."""
    return f"a rocket {next(_numbers)}, fluent 3d style"


def best_throughput(pipeline: Pipeline, seconds: float) -> float:
    """Images a second in full batches, in this process alone."""

    def draw() -> None:
        pipeline.generate([new_prompt() for _ in range(LARGEST_BATCH)], batch_size=LARGEST_BATCH)

    for _ in range(2):
        draw()
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        draw()
        batches += 1
    return batches * LARGEST_BATCH / (time.perf_counter() - start)


@dataclass
class Saturation:
    """Clients who always ask, and what they got; they only write and read, to leave the machine to the server."""

    served: int = 0
    failed: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.served / self.seconds

    async def run(self, url: str, seconds: float) -> None:
        """Have them ask for so long."""
        start = time.perf_counter()
        await asyncio.gather(*(self._client(url, number, start + seconds) for number in range(CLIENTS)))
        self.seconds = time.perf_counter() - start

    async def _client(self, url: str, number: int, end: float) -> None:
        place = urlsplit(url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        while time.perf_counter() < end:
            writer.write(request_of(json.dumps({"prompt": new_prompt(), "user": str(number)}).encode()))
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            drawn = head.startswith(b"HTTP/1.1 200 ")
            self.served += drawn
            self.failed += not drawn
        writer.close()
        await writer.wait_closed()


async def soak(url: str, process: int, seconds: float) -> dict[str, Any]:
    """Saturate for long, and look at memory and open files all the while."""
    clients, looks = Saturation(), list[tuple[float, float, int]]()
    running = asyncio.create_task(clients.run(url, seconds))
    start = time.perf_counter()
    while not running.done():
        await asyncio.wait([running], timeout=SECONDS_BETWEEN_LOOKS)
        looks.append((time.perf_counter() - start, memory(process), handles(process)))
    await running
    tenth = max(1, len(looks) // 10)
    return {
        "seconds": round(clients.seconds),
        "images": clients.served,
        "failed": clients.failed,
        "memory_mebibytes": {
            "second_tenth": round(median(look[1] for look in looks[tenth : 2 * tenth + 1]), 1),
            "last_tenth": round(median(look[1] for look in looks[-tenth:]), 1),
        },
        "handles": [looks[0][2], looks[-1][2]],
        "looks": [[round(value, 1) for value in look] for look in looks],
    }


def throughput(url: str, pipeline: Pipeline, seconds: float) -> dict[str, float]:
    """Images a second of the pipeline alone and of the server, medians of turns: the machine is not always as fast."""
    own, served = [], []
    for _ in range(TURNS):
        own.append(best_throughput(pipeline, seconds / TURNS))
        clients = Saturation()
        asyncio.run(clients.run(url, seconds / TURNS))
        served.append(clients.rate)
    shares = [there / here for here, there in zip(own, served, strict=True)]
    return {"pipeline": round(median(own), 2), "http": round(median(served), 2), "share": round(median(shares), 3)}


def family(process: int) -> Iterator[tuple[Path, str]]:
    """Folder below /proc and status of a process and of its children."""
    for status in Path("/proc").glob("[0-9]*/status"):
        text = status.read_text() if status.exists() else ""
        parent = re.search(r"^PPid:\s+(\d+)", text, re.MULTILINE)
        if status.parent.name == str(process) or (parent and parent[1] == str(process)):
            yield status.parent, text


def memory(process: int) -> float:
    """MiB that a process and its children hold."""
    found = (re.search(r"^VmRSS:\s+(\d+)", text, re.MULTILINE) for _, text in family(process))
    return sum(int(resident[1]) for resident in found if resident) / 1024


def handles(process: int) -> int:
    """Open files and sockets of a process and its children."""
    return sum(1 for folder, _ in family(process) for _ in (folder / "fd").iterdir())


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/emoji-student"))
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=90.0, help="of throughput, of the server as of the pipeline")
    parser.add_argument("--overload", type=float, default=60.0, help="seconds")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of saturation, for leaks")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pipeline = Pipeline.from_pretrained(options.model, options.engine)
    facts: dict[str, Any] = {"machine": machine(), "engine": pipeline.engine_name, "largest_batch": LARGEST_BATCH}
    with serving(options.model, options.engine) as (url, process):
        facts["latency"] = latency(url, pipeline, options.rounds)
        facts["throughput"] = throughput(url, pipeline, options.seconds)
        served = facts["throughput"]["http"]
        before = memory(process), handles(process)
        arrivals = list(poisson(3 * served, options.overload, seed=0))
        outcome, took = asyncio.run(send(url + PATH, {"n": 1}, arrivals, ""))
        facts["overload"] = summary(outcome, took, 1, 3 * served) | {
            "seconds": options.overload,
            "promised_wait_seconds": WAIT,
            "memory_mebibytes": [round(before[0], 1), round(memory(process), 1)],
            "handles": [before[1], handles(process)],
        }
        if options.soak:
            facts["soak"] = asyncio.run(soak(url, process, options.soak))
    Console().print(facts)
    write_json(options.out, facts)


if __name__ == "__main__":
    main()
