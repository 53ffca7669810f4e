"""A model's queue and seats, with workers that fail as they are told."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.app.serve.jobs import Job, Picture, User
from fewstep.app.serve.metrics import Metrics
from fewstep.app.serve.service import FullError, Limits, Service, TooManyError
from fewstep.app.serve.worker import Batch, Drawn, EndedError, EngineError, ModelSettings, RefusedError

from .conftest import FACTS

FAULTS: dict[str, type[Exception]] = {"poison": EndedError, "broken": EngineError, "refused": RefusedError}
"""By what a prompt begins with."""


class Worker:
    """Draws at once; `opening` is what happens to the next ones that open."""

    opening: Iterator[Exception | None] = iter(())
    opened: list["Worker"]

    def __init__(self, _: ModelSettings) -> None:
        if error := next(Worker.opening, None):
            raise error
        self.facts, self.process_id, self.alive = FACTS, len(Worker.opened), True
        self.sentinel, self._end = os.pipe()
        self.free = asyncio.Event()
        self.free.set()
        Worker.opened.append(self)

    async def draw(self, batch: Batch, preview: object = None) -> Drawn:
        await self.free.wait()
        for prompt in batch.prompts:
            if fault := FAULTS.get(prompt.split()[0]):
                raise fault
        return Drawn(np.zeros((len(batch.prompts), 8, 8, 3), np.uint8), "none", {})

    def end(self) -> None:
        os.write(self._end, b"0")

    def close(self) -> None:
        self.alive = False
        os.close(self._end)
        os.close(self.sentinel)


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    monkeypatch.setattr("fewstep.app.serve.service.Worker", Worker)
    monkeypatch.setattr("fewstep.app.serve.service.RESTART_SECONDS", (0.0,))
    monkeypatch.setattr(Worker, "opening", iter(()))
    monkeypatch.setattr(Worker, "opened", [], raising=False)
    return Worker.opened


def run(test: Callable[[Service], Coroutine[Any, Any, None]], **limits: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            settings = ModelSettings(Path(), largest_batch=4)
            service = await Service.open("model", settings, Limits(**limits), Metrics())
            await test(service)
            await service.close()
        assert not any(worker.alive for worker in Worker.opened)

    asyncio.run(limited())


def jobs(*prompts: str, user: str = "one") -> list[Job]:
    return [Job(prompt, 0, 1, None, "", User(user), 60.0) for prompt in prompts]


async def drawn(service: Service, *prompts: str) -> list[Picture | BaseException]:
    asked = jobs(*prompts)
    await service.submit(asked)
    return await asyncio.gather(*(job.picture for job in asked), return_exceptions=True)


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), RuntimeError("can't start new thread")])
def test_a_system_that_has_no_room_for_a_process_is_asked_again(error: Exception) -> None:
    async def test(service: Service) -> None:
        Worker.opening = iter([error, error])
        assert isinstance((await drawn(service, "poison"))[0], EngineError)
        assert isinstance((await drawn(service, "a square"))[0], Picture)

    run(test)


def test_an_engine_that_goes_on_failing_gets_another_process_and_one_that_refuses_does_not() -> None:
    async def test(service: Service) -> None:
        for prompt in ("refused", "broken", "broken", "a square", "broken", "broken"):
            await drawn(service, prompt)
        assert len(Worker.opened) == 1
        await drawn(service, "broken")
        assert isinstance((await drawn(service, "a square"))[0], Picture)
        assert [worker.alive for worker in Worker.opened] == [False, True]

    run(test)


def test_an_image_that_ends_its_process_fails_alone() -> None:
    async def test(service: Service) -> None:
        outcomes = await drawn(service, "a square", "poison", "a square", "a square")
        assert [isinstance(outcome, Picture) for outcome in outcomes] == [True, False, True, True]
        assert isinstance(outcomes[1], EngineError)

    run(test)


def test_a_worker_that_ends_while_it_is_idle_is_replaced_before_the_next_request() -> None:
    async def test(service: Service) -> None:
        await asyncio.sleep(0)  # until its seat waits for jobs
        Worker.opened[0].end()
        while not (len(Worker.opened) == 2 and service.ready):
            await asyncio.sleep(0.01)
        assert isinstance((await drawn(service, "a square"))[0], Picture)
        assert "fewstep_worker_restarts_total" in str(list(service.metrics.registry.collect()))

    run(test)


def test_whoever_asks_for_much_waits_for_himself() -> None:
    async def test(service: Service) -> None:
        Worker.opened[0].free.clear()
        requests = [service.submit(jobs("a square")) for _ in range(1000)]
        with pytest.raises(FullError, match="too many images are waiting"):
            await asyncio.gather(*requests)
        await service.submit(jobs("a square", user="two"))
        Worker.opened[0].free.set()

    run(test, wait_seconds=1.0)
    run(test, wait_seconds=1000.0, images=16)


def test_what_would_be_too_much_for_an_empty_queue_is_refused_for_good() -> None:
    async def test(service: Service) -> None:
        await service.submit(jobs(*["a square"] * 100))
        with pytest.raises(TooManyError, match="these images take about 2 s"):
            await service.submit(jobs(*["a square"] * 200, user="two"))

    run(test, wait_seconds=1.0)
