"""Images that wait for an engine: a bounded queue, fair between users, that gives batches."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Picture:
    """What became of a job.

    Args:
        pixels: (H, W, 3) uint8.
        engine: that drew it.
        weights: their hash.
    """

    pixels: npt.NDArray[np.uint8]
    engine: str
    weights: str


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


class User(NamedTuple):
    """Who asks: owners (of keys; without keys, addresses) take turns, and so do the users that an owner names."""

    owner: str
    name: str = ""


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
        started: whether an engine has it.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float | None
    negative: str
    user: User
    patience: float
    preview: Preview | None = None
    start: Start | None = None
    attempts: int = 0
    started: bool = False
    made: float = field(default_factory=time.monotonic)
    picture: asyncio.Future[Picture] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def kind(self) -> tuple[object, ...]:
        """Jobs of one kind can be drawn together.

        Drawn alone is one that wants previews, and one over which an engine ended: it may end another.
        """
        strength = self.start.strength if self.start else None
        alone = id(self) if self.preview or self.attempts else None
        return self.steps, self.guidance, self.negative, strength, alone

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
        self._owners: dict[str, dict[str, deque[Job]]] = {}
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return sum(map(len, self._waiting()))

    def count(self, owner: str) -> int:
        """Jobs of one owner."""
        return sum(map(len, self._owners.get(owner, {}).values()))

    def load_ahead(self, user: User, count: int) -> int:
        """Network evaluations that are drawn before the last of `count` more jobs of a user, as turns are now."""
        own = self._owners.get(user.owner, {})
        turns = len(own.get(user.name, ())) + count
        ahead = [job for jobs in own.values() for job in islice(jobs, turns)]
        turns = len(ahead) + count
        for owner, users in self._owners.items():
            if owner != user.owner:
                ahead += islice(chain.from_iterable(users.values()), turns)
        return sum(job.evaluations for job in ahead)

    async def put(self, jobs: Sequence[Job]) -> None:
        """Add jobs behind those of their users."""
        async with self._changed:
            for job in jobs:
                self._place(job).append(job)
            self._changed.notify_all()
        self._expect(jobs)

    async def put_back(self, jobs: Sequence[Job]) -> None:
        """Return jobs that were taken and not drawn to where they were."""
        async with self._changed:
            for job in reversed(jobs):
                job.started = False
                self._place(job).appendleft(job)
            self._changed.notify_all()
        self._expect(jobs)

    def _waiting(self) -> Iterator[deque[Job]]:
        return chain.from_iterable(users.values() for users in self._owners.values())

    def _place(self, job: Job) -> deque[Job]:
        return self._owners.setdefault(job.user.owner, {}).setdefault(job.user.name, deque())

    def _expect(self, jobs: Sequence[Job]) -> None:
        """Have them expire in time even if no engine comes for them: it may have ended."""
        seconds = max((job.patience - job.waited for job in jobs), default=0.0)
        asyncio.get_running_loop().call_later(seconds + 1e-3, self._drop_dead)

    def discard(self, jobs: Sequence[Job]) -> None:
        """Remove jobs that nobody waits for any more; those that are being drawn are let be."""
        for job in jobs:
            job.picture.cancel()
        if jobs:
            self._drop_dead()

    async def take(self, largest: int, linger: float) -> list[Job]:
        """Wait for jobs of one kind.

        Args:
            largest: jobs at the most.
            linger: seconds to wait for more to come, once there is one.
        """
        async with self._changed:
            while True:
                await self._changed.wait_for(lambda: self._owners)
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
        """One job of every owner, again and again: of one kind, which the first has."""
        self._drop_dead()
        picked: list[Job] = []
        found = True
        while found and len(picked) < largest:
            found = False
            for owner in list(self._owners):
                if len(picked) < largest and (job := self._next(owner, picked)):
                    picked.append(job)
                    found = True
        for job in picked:
            job.started = True
        return picked

    def _next(self, owner: str, company: Sequence[Job]) -> Job | None:
        """The owner's next job that fits its company; the owner and its user go to the end, the others come first."""
        users = self._owners[owner]
        fitting = (name for name, jobs in users.items() if not company or jobs[0].kind == company[0].kind)
        name = next(fitting, None)
        if name is None:
            return None
        jobs = users.pop(name)
        job = jobs.popleft()
        if jobs:
            users[name] = jobs
        del self._owners[owner]
        if users:
            self._owners[owner] = users
        return job

    def _drop_dead(self) -> None:
        """Drop jobs that were cancelled, and those that have waited too long."""
        for owner, users in list(self._owners.items()):
            for name, jobs in list(users.items()):
                living = deque(job for job in jobs if not job.picture.done() and not self._expired(job))
                if living:
                    users[name] = living
                else:
                    del users[name]
            if not users:
                del self._owners[owner]

    @staticmethod
    def _expired(job: Job) -> bool:
        if job.waited < job.patience:
            return False
        job.picture.set_exception(ExpiredError())
        return True
