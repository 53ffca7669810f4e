"""What a worker says arrives whole, and one that says no more holds nobody up."""

import asyncio
import multiprocessing
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from fewstep.app.serve.command import _loop_factory
from fewstep.app.serve.worker import Batch, EndedError, ModelSettings, Worker

from .conftest import FACTS


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("factory", [None, _loop_factory()], ids=["asyncio", "the server's"])
def test_an_answer_longer_than_any_buffer_is_heard_whole(
    factory: Callable[[], asyncio.AbstractEventLoop] | None, apart: bool
) -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = Worker.__new__(Worker)
    worker._connection, worker._apart = ours, apart
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)

    async def hear() -> list[np.ndarray]:
        heard = []
        for _ in range(20):
            sender = threading.Thread(target=theirs.send, args=(pixels,))
            sender.start()
            heard.append(await worker._answer())
            sender.join()
        return heard

    with ours, theirs, asyncio.Runner(loop_factory=factory) as runner:
        assert all(np.array_equal(answer, pixels) for answer in runner.run(hear()))


def stop_midway(connection: Connection, settings: ModelSettings) -> None:
    """Work of a process that is stopped when it has heard (`settings.threads` 0) or said (1) a part of something."""
    connection.send(replace(FACTS, width=1024, height=1024))
    if settings.threads == 0:
        os.read(connection.fileno(), 10)
    else:
        connection.recv()
        os.write(connection.fileno(), struct.pack("!i", 1000) + b"a part")
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("said", [0, 1])
def test_a_process_that_is_stopped_midway_holds_nobody_up_and_is_ended(
    said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.app.serve.worker._work", stop_midway)
    monkeypatch.setattr(
        "sys.path", [*sys.path, str(Path(__file__).parents[2])]
    )  # the process gets it, and imports this
    worker = Worker(ModelSettings(Path(), threads=said))
    monkeypatch.setattr("fewstep.app.serve.worker.CALL_SECONDS", 0.5)
    pixels = np.zeros((1024, 1024, 3), np.uint8)

    async def draw() -> int:
        drawing = asyncio.create_task(worker.draw(Batch([""], [0], 1, None, "", images=[pixels])))
        turns = 0
        while not drawing.done():
            turns += 1
            await asyncio.sleep(0.01)
        with pytest.raises(EndedError):
            await drawing
        return turns

    assert asyncio.run(draw()) > 2  # one, if the event loop were held up
    worker.close()
    assert worker._process.exitcode == -signal.SIGKILL
