"""A replica that draws: models with their queues and processes as in a server of its own, asked by `ray_front.py`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.errors import FewstepError
from .command import log_lines
from .context import Context
from .faults import FaultError
from .jobs import Job, Picture
from .keys import Keys
from .metrics import Metrics
from .ray_metrics import publish
from .ray_settings import RaySettings
from .service import Service
from .worker import Facts

Order = dict[str, Any]
"""What a `Job` is made of, as it goes from a front to a replica."""
OWN = {"preview", "attempts", "started", "made", "picture"}
"""Of a `Job`, what stays where it was made."""
Reply = None | npt.NDArray[np.uint8] | list[Picture] | dict[str, Any]
"""None: queued; pixels (H, W, 3) of a preview; then the pictures, or a `FaultError` by its arguments."""


def order_of(job: Job) -> Order:
    """A job as an order; its patience is what is left of it."""
    kept = {field.name: getattr(job, field.name) for field in fields(job) if field.name not in OWN}
    return kept | {"patience": job.patience - job.waited}


class Opened:
    """A model that is open; Ray calls `__del__` of the instance to have it closed when others need its place."""

    def __init__(self, service: Service) -> None:
        self.service, self._orders = service, 0
        self._idle = asyncio.Event()
        self._idle.set()
        # Of the instance, not of the class: Python's collector must not call it.
        self.__dict__["__del__"] = self.close

    def take(self) -> None:
        """Keep it open until it is given back."""
        self._orders += 1
        self._idle.clear()

    def give_back(self) -> None:
        """One order less."""
        self._orders -= 1
        if not self._orders:
            self._idle.set()

    async def close(self) -> None:
        """End its processes once all orders are drawn."""
        await self._idle.wait()
        await self.service.close()


class Models:
    """The deployment; `ray_application.py` bounds the number of models that `open` keeps."""

    def __init__(self, settings: RaySettings) -> None:
        log_lines()
        self._settings = settings
        self._context = Context(settings.limits, Keys(), Metrics())
        self._publishing = asyncio.create_task(publish(self._context.metrics.registry))

    async def reconfigure(self, config: Mapping[str, Sequence[str]]) -> None:
        """Open models before the first request; Ray calls this when the replica is made."""
        for name in config["models"]:
            await self.open(name)

    async def open(self, name: str) -> Opened:
        """Open a model.

        Raises:
            FewstepError: it does not open.
        """
        settings = self._settings.models[name].settings
        return Opened(await Service.open(name, settings, self._settings.limits, self._context.metrics))

    async def facts(self, name: str) -> Facts | str:
        """What a model says of itself, or the sentence that says why it does not open."""
        try:
            async with self._held(name) as service:
                assert service.facts is not None
                return service.facts
        except FewstepError as error:
            return str(error)

    async def draw(self, name: str, orders: Sequence[Order], previews: bool) -> AsyncIterator[Reply]:
        """Draw the images of one request; whoever stops listening takes them from the queue."""
        begin = asyncio.get_running_loop().time()
        try:
            async with self._held(name) as service:
                spent = asyncio.get_running_loop().time() - begin
                yield None
                async for reply in self._replies(service, orders, previews, spent):
                    yield reply
        except FewstepError:  # the sentence names folders: it is for the log, where Ray writes it
            yield vars(FaultError(503, "model_not_open", "the model does not open; the log says more"))

    @contextlib.asynccontextmanager
    async def _held(self, name: str) -> AsyncIterator[Service]:
        """A model that is open, and stays so meanwhile."""
        # In a task of its own: a client that leaves must not leave a model half open.
        taking = asyncio.create_task(self._take(name))
        try:
            yield (await asyncio.shield(taking)).service
        finally:
            taking.add_done_callback(_give_back)

    async def _take(self, name: str) -> Opened:
        # Nothing may come between: whoever waits for the place of this model would close it before it is used.
        (opened := await self.open(name)).take()
        return opened

    async def _replies(
        self, service: Service, orders: Sequence[Order], previews: bool, spent: float
    ) -> AsyncIterator[Reply]:
        shown: asyncio.Queue[npt.NDArray[np.uint8] | None] = asyncio.Queue()
        preview = shown.put_nowait if previews else None
        jobs = [Job(**order | {"patience": order["patience"] - spent}, preview=preview) for order in orders]
        drawing = asyncio.create_task(self._context.draw(service, jobs))
        drawing.add_done_callback(lambda _: shown.put_nowait(None))
        try:
            while (pixels := await shown.get()) is not None:
                yield pixels
            yield drawing.result()
        except FaultError as fault:
            yield vars(fault)
        finally:
            drawing.cancel()

    async def __del__(self) -> None:
        self._publishing.cancel()


def _give_back(taking: asyncio.Task[Opened]) -> None:
    if not taking.cancelled() and not taking.exception():
        taking.result().give_back()
