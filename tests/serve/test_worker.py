"""What a worker says arrives whole."""

import asyncio
import multiprocessing
import threading
from collections.abc import Callable

import numpy as np
import pytest

from fewstep.app.serve.command import _loop_factory
from fewstep.app.serve.worker import Worker


@pytest.mark.parametrize("factory", [None, _loop_factory()], ids=["asyncio", "the server's"])
def test_an_answer_longer_than_any_buffer_is_heard_whole(
    factory: Callable[[], asyncio.AbstractEventLoop] | None,
) -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = Worker.__new__(Worker)
    worker._connection = ours
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
