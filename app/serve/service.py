"""One served model: its queue, and the workers that draw from it; workers come and go, the queue stays."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from .jobs import FairQueue, Job, Picture
from .metrics import Metrics
from .worker import Batch, EndedError, EngineError, Facts, ModelSettings, RefusedError, Worker

MOST_ATTEMPTS = 2
"""Processes that one image may end before it is given up: it may be what ends them."""
MOST_FAILURES = 3
"""In a row: then the engine is broken (as a GPU is after an illegal access), and its process is replaced."""
RESTART_SECONDS = (0.0, 1.0, 5.0, 15.0, 60.0)
"""Before a model is opened again, the last one repeatedly."""
LEARNING = 0.2
"""Weight of a full batch in the running average of the time that an evaluation takes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a queue promises.

    Args:
        wait_seconds: nobody waits longer for an engine to begin.
        images: that wait at the most.
        linger_seconds: that an engine waits for a batch to fill once there is an image; 0 has batches form only while
            engines are busy, and costs a lonely request nothing.
    """

    wait_seconds: float = 5.0
    images: int = 2048
    linger_seconds: float = 0.0


class FullError(Exception):
    """The queue is full.

    Args:
        retry_after: seconds after which it is worth another try.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many images are waiting: try again in {retry_after} s")
        self.retry_after = retry_after


class TooManyError(Exception):
    """A request that would be too much even for a queue that is empty.

    Args:
        seconds: that it takes.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"these images take about {seconds:.0f} s, which is longer than one may wait: ask for fewer")


class Service:
    """A model by name, with `replicas` processes that draw; make it with `await Service.open(...)`."""

    def __init__(self, name: str, settings: ModelSettings, limits: Limits, metrics: Metrics) -> None:
        self.name, self.settings, self.limits, self.metrics = name, settings, limits, metrics
        self.facts: Facts | None = None
        self._queue = FairQueue()
        self._seats: list[_Seat] = []
        self._reloading = asyncio.Lock()
        self._evaluation_seconds = math.inf
        metrics.watch(name, self._queue.__len__)

    @classmethod
    async def open(
        cls, name: str, settings: ModelSettings, limits: Limits, metrics: Metrics, replicas: int = 1
    ) -> "Service":
        """Open the model in as many processes.

        Raises:
            FewstepError: it does not open.
        """
        service = cls(name, settings, limits, metrics)
        service._take_seats(await service._hire(replicas))
        return service

    @property
    def ready(self) -> bool:
        """Whether an engine is there to draw."""
        return any(seat.worker for seat in self._seats)

    @property
    def process_ids(self) -> list[int]:
        """Of its workers."""
        return [seat.worker.process_id for seat in self._seats if seat.worker]

    async def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none.

        Raises:
            FullError: they would wait longer than the limits allow, or take others' places.
            TooManyError: the last would wait for the first for longer than the limits allow.
        """
        queue, user, most = self._queue, jobs[0].user, self.limits.wait_seconds
        own = self._seconds(sum(job.evaluations for job in jobs[self.settings.largest_batch :]))
        if own > most or len(jobs) > self.limits.images:
            raise TooManyError(own)
        ahead = queue.load_ahead(user, len(jobs)) + sum(seat.load for seat in self._seats)
        expected = self._seconds(ahead) + own
        mine, free = queue.count(user.owner), self.limits.images - len(queue) - len(jobs)
        # Nobody has more places than he leaves free, but for one: so there is always room for somebody else.
        if expected > most or free < 0 or (mine and mine + len(jobs) > free + 1):
            raise FullError(max(1, math.ceil(expected - most / 2)))
        await queue.put(jobs)

    def _seconds(self, evaluations: int) -> float:
        return evaluations * self._evaluation_seconds / max(1, len(self._seats))

    def discard(self, jobs: Sequence[Job]) -> None:
        """Forget jobs that nobody waits for any more."""
        self._queue.discard(jobs)

    async def reload(self) -> None:
        """Open the model anew, as it now lies on the disk; the old processes draw until the new ones are ready.

        Raises:
            FewstepError: it does not open; the old ones stay.
        """
        async with self._reloading:
            old = list(self._seats)
            self._take_seats(await self._hire(len(old)))
            await asyncio.gather(*(seat.leave() for seat in old))

    async def close(self) -> None:
        """End all processes, after what they are drawing."""
        await asyncio.gather(*(seat.leave() for seat in self._seats))

    async def _hire(self, count: int) -> list[Worker]:
        """Start so many workers at once; if one fails, none is left."""
        starts = [asyncio.to_thread(Worker, self.settings) for _ in range(count)]
        outcomes = await asyncio.gather(*starts, return_exceptions=True)
        workers = [outcome for outcome in outcomes if isinstance(outcome, Worker)]
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            await asyncio.gather(*(asyncio.to_thread(worker.close) for worker in workers))
            raise failures[0]
        return workers

    def _take_seats(self, workers: Sequence[Worker]) -> None:
        self.facts = workers[0].facts
        self._evaluation_seconds = self.facts.evaluation_seconds
        self._seats = [_Seat(self, worker) for worker in workers]

    async def _replace(self) -> Worker:
        """Another worker for one that ended, however long it takes to get one."""
        pauses = chain(RESTART_SECONDS, repeat(RESTART_SECONDS[-1]))
        while True:
            await asyncio.sleep(next(pauses))
            try:
                worker = await asyncio.to_thread(Worker, self.settings)
            except Exception as error:  # the system may have no memory for a process, no file, no thread: for now
                logger.error("the model does not open again", extra={"model": self.name, "cause": str(error)})
            else:
                self.metrics.restarts.labels(self.name).inc()
                return worker

    def _learn(self, jobs: Sequence[Job], seconds: float) -> None:
        """Follow the time of an evaluation, by full batches above all: they are what a queue is worked off with."""
        weight = LEARNING * len(jobs) / self.settings.largest_batch
        found = seconds / sum(job.evaluations for job in jobs)
        self._evaluation_seconds += weight * (found - self._evaluation_seconds)


class _Seat:
    """Where a worker sits: takes batches from the queue, and gets another worker when this one ends."""

    def __init__(self, service: Service, worker: Worker) -> None:
        self.worker: Worker | None = None
        self._taking: asyncio.Timeout | None = None
        self._sit(worker)
        self._service, self._jobs, self._leaving, self._failures = service, list[Job](), False, 0
        self._task = asyncio.create_task(self._run(), name=f"draw {service.name}")

    @property
    def load(self) -> int:
        """Evaluations of what is being drawn."""
        return sum(job.evaluations for job in self._jobs)

    async def leave(self) -> None:
        """End after the batch at hand."""
        self._leaving = True
        if not self._jobs:
            self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self.worker:
            await asyncio.to_thread(self._rise().close)

    def _sit(self, worker: Worker) -> None:
        self.worker = worker
        asyncio.get_running_loop().add_reader(worker.sentinel, self._see_end, worker.sentinel)

    def _rise(self) -> Worker:
        worker, self.worker = self.worker, None
        assert worker is not None
        asyncio.get_running_loop().remove_reader(worker.sentinel)
        return worker

    def _see_end(self, sentinel: int) -> None:
        """A worker that is drawing is missed anyway; for one that is idle, taking jobs is interrupted."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(sentinel)
        if self._taking:
            self._taking.reschedule(loop.time())

    async def _take(self) -> list[Job]:
        """The next jobs, for a worker that is there."""
        service = self._service
        while True:
            try:
                async with asyncio.timeout(None) as self._taking:
                    return await service._queue.take(service.settings.largest_batch, service.limits.linger_seconds)
            except TimeoutError:
                await self._recover([])
            finally:
                self._taking = None

    async def _run(self) -> None:
        while not self._leaving:
            self._jobs = await self._take()
            try:
                await self._attempt(self._jobs)
            except Exception as error:  # a fault of ours: those who wait must hear of it, and the seat stays taken
                logger.exception("drawing failed")
                fail(self._jobs, EngineError(type(error).__name__))
            finally:
                self._jobs = []

    async def _attempt(self, jobs: Sequence[Job]) -> None:
        try:
            await self._draw(jobs)
        except EndedError:
            await self._recover(jobs)
        except EngineError as error:
            await self._draw_singly(jobs, error)
        if self._failures >= MOST_FAILURES:
            await self._recover([])

    async def _draw(self, jobs: Sequence[Job]) -> None:
        assert self.worker is not None
        loop, begin = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        waits = [job.waited for job in jobs]
        first = jobs[0]
        batch = Batch(
            [job.prompt for job in jobs],
            [job.seed for job in jobs],
            first.steps,
            first.guidance,
            first.negative,
            [job.start.pixels for job in jobs if job.start],
            first.start.strength if first.start else None,
        )
        worker = self.worker
        try:
            drawn = await worker.draw(batch, first.preview)
        except EngineError as error:
            self._failures += not isinstance(error, RefusedError)
            raise
        self._failures = 0
        self._service._learn(jobs, loop.time() - begin)
        self._service.metrics.drawn(self._service.name, drawn, waits)
        for job, pixels in zip(jobs, drawn.pixels, strict=True):
            if not job.picture.done():  # nobody waits for one that was cancelled
                job.picture.set_result(Picture(pixels, drawn.engine, worker.facts.weights))

    async def _draw_singly(self, jobs: Sequence[Job], error: EngineError) -> None:
        """Try each image of a batch that failed alone: one must not spoil the others."""
        logger.error("the engine failed", extra={"model": self._service.name, "cause": str(error)})
        if len(jobs) == 1:
            fail(jobs, error)
            return
        for position, job in enumerate(jobs):
            try:
                await self._draw([job])
            except EngineError as other:
                fail([job], other)
            except EndedError:
                await self._recover(jobs[position:])
                return

    async def _recover(self, lost: Sequence[Job]) -> None:
        """Give jobs back that were not drawn, and wait for another worker."""
        service, worker = self._service, self._rise()
        event = "a worker failed too often" if self._failures else "a worker ended"
        self._failures = 0
        logger.error(event, extra={"model": service.name, "process_id": worker.process_id})
        for job in lost:
            job.attempts += 1
        fail([job for job in lost if job.attempts >= MOST_ATTEMPTS], EngineError("its process ended twice"))
        await service._queue.put_back([job for job in lost if job.attempts < MOST_ATTEMPTS])
        self._jobs = []
        await asyncio.to_thread(worker.close)
        self._sit(await service._replace())


def fail(jobs: Sequence[Job], error: Exception) -> None:
    """Tell those who wait for jobs what went wrong."""
    for job in jobs:
        if not job.picture.done():
            job.picture.set_exception(error)
