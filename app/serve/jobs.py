"""Images that wait for an engine: a bounded queue, fair between users, that gives batches."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Picture:
    """What became of a job.

    Args:
        pixels: (H, W, 3) uint8.
        engine: that drew it.
    """

    pixels: npt.NDArray[np.uint8]
    engine: str


@dataclass(frozen=True)
class Start:
    """What image-to-image starts from.

    Args:
        pixels: (H, W, 3) uint8, of the model's size.
        strength: in (0, 1).
        evaluations: that are left of the steps.
    """

    pixels: npt.NDArray[np.uint8]
    strength: float
    evaluations: int


Preview = Callable[[npt.NDArray[np.uint8]], None]
"""Takes the pixels that one evaluation of the network foresees."""


class ExpiredError(Exception):
    """A job waited longer than it may."""


@dataclass(eq=False)
class Job:
    """One image that somebody waits for; make it inside the event loop.

    Args:
        prompt: what to draw.
        seed: of the image.
        steps: network evaluations.
        guidance: scale; None for the model's own.
        negative: what not to draw; empty for nothing.
        user: whose turn it takes.
        patience: seconds that it may wait.
        preview: wants a look after every evaluation.
        start: of image-to-image.
        attempts: engines that ended over it.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float | None
    negative: str
    user: str
    patience: float
    preview: Preview | None = None
    start: Start | None = None
    attempts: int = 0
    made: float = field(default_factory=time.monotonic)
    picture: asyncio.Future[Picture] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def kind(self) -> tuple[object, ...]:
        """Jobs of one kind can be drawn together; one that wants previews is drawn alone."""
        strength = self.start.strength if self.start else None
        return self.steps, self.guidance, self.negative, strength, self.preview and id(self)

    @property
    def evaluations(self) -> int:
        """Network evaluations that it takes."""
        return self.start.evaluations if self.start else self.steps

    @property
    def waited(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self.made


class FairQueue:
    """Jobs in turns of their users: who asks for much waits for himself, not for others."""

    def __init__(self) -> None:
        self._users: dict[str, deque[Job]] = {}
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._users.values())

    @property
    def load(self) -> int:
        """Network evaluations that wait."""
        return sum(job.evaluations for jobs in self._users.values() for job in jobs)

    async def put(self, jobs: Sequence[Job]) -> None:
        """Add jobs behind those of their users."""
        async with self._changed:
            for job in jobs:
                self._users.setdefault(job.user, deque()).append(job)
            self._changed.notify_all()
        self._expect(jobs)

    async def put_back(self, jobs: Sequence[Job]) -> None:
        """Return jobs that were taken and not drawn to where they were."""
        async with self._changed:
            for job in reversed(jobs):
                self._users.setdefault(job.user, deque()).appendleft(job)
            self._changed.notify_all()
        self._expect(jobs)

    def _expect(self, jobs: Sequence[Job]) -> None:
        """Have them expire in time even if no engine comes for them: it may have ended."""
        seconds = max((job.patience - job.waited for job in jobs), default=0.0)
        asyncio.get_running_loop().call_later(seconds + 1e-3, self._drop_dead)

    def discard(self, jobs: Sequence[Job]) -> None:
        """Remove jobs that nobody waits for any more; those that are being drawn are let be."""
        for job in jobs:
            job.picture.cancel()
        self._drop_dead()

    async def take(self, largest: int, linger: float) -> list[Job]:
        """Wait for jobs of one kind.

        Args:
            largest: jobs at the most.
            linger: seconds to wait for more to come, once there is one.
        """
        async with self._changed:
            while True:
                await self._changed.wait_for(lambda: self._users)
                if linger > 0 and len(self) < largest:
                    await self._until(largest, linger)
                if jobs := self._pick(largest):
                    return jobs

    async def _until(self, wanted: int, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait_for(lambda: len(self) >= wanted)
        except TimeoutError:
            pass

    def _pick(self, largest: int) -> list[Job]:
        self._drop_dead()
        picked: list[Job] = []
        while len(picked) < largest:
            turn = [user for user, jobs in self._users.items() if not picked or jobs[0].kind == picked[0].kind]
            for user in turn[: largest - len(picked) if picked else 1]:
                jobs = self._users.pop(user)
                picked.append(jobs.popleft())
                if jobs:
                    self._users[user] = jobs  # at the end: the others come first
            if not turn:
                break
        return picked

    def _drop_dead(self) -> None:
        """Drop jobs that were cancelled, and those that have waited too long."""
        for user, jobs in list(self._users.items()):
            living = deque(job for job in jobs if not job.picture.done() and not self._expired(job))
            if living:
                self._users[user] = living
            else:
                del self._users[user]

    @staticmethod
    def _expired(job: Job) -> bool:
        if job.waited < job.patience:
            return False
        job.picture.set_exception(ExpiredError())
        return True
