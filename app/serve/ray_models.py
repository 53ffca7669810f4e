"""A replica that draws: models with their queues and processes as in a server of its own, asked by `ray_front.py`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
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
OWN = {"preview", "attempts", "made", "picture"}
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
        self.service, self.closed, self._orders = service, False, 0
        self._idle = asyncio.Event()
        self._idle.set()
        # Of the instance, not of the class: Python's collector must not call it.
        self.__dict__["__del__"] = self.close

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Service]:
        """Keep it open."""
        self._orders += 1
        self._idle.clear()
        try:
            yield self.service
        finally:
            self._orders -= 1
            if not self._orders:
                self._idle.set()

    async def close(self) -> None:
        """End its processes once all orders are drawn."""
        self.closed = True
        await self._idle.wait()
        await self.service.close()


class Models:
    """The deployment; `ray_application.py` bounds the number of models that `open` keeps."""

    def __init__(self, settings: RaySettings) -> None:
        log_lines()
        self._settings = settings
        self._context = Context(settings.limits, Keys(), Metrics())
        self._publishing = asyncio.create_task(publish(self._context.metrics.registry))

    async def reconfigure(self, names: Sequence[str]) -> None:
        """Open models before the first request; Ray calls this when the replica is made."""
        for name in names:
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
            facts = (await self._held(name)).service.facts
        except FewstepError as error:
            return str(error)
        assert facts is not None
        return facts

    async def draw(self, name: str, orders: Sequence[Order], previews: bool) -> AsyncIterator[Reply]:
        """Draw the images of one request; whoever stops listening takes them from the queue."""
        begin = asyncio.get_running_loop().time()
        try:
            opened = await self._held(name)
        except FewstepError as error:
            yield vars(FaultError(503, "model_not_open", str(error)))
            return
        spent = asyncio.get_running_loop().time() - begin
        with opened.in_use() as service:
            yield None
            async for reply in self._replies(service, orders, previews, spent):
                yield reply

    async def _held(self, name: str) -> Opened:
        # In a task of its own: a client that leaves must not leave a model half open.
        while (opened := await asyncio.shield(asyncio.ensure_future(self.open(name)))).closed:
            pass
        return opened

    async def _replies(
        self, service: Service, orders: Sequence[Order], previews: bool, spent: float
    ) -> AsyncIterator[Reply]:
        shown: asyncio.Queue[npt.NDArray[np.uint8] | None] = asyncio.Queue()
        preview = shown.put_nowait if previews else None
        jobs = [Job(**order | {"patience": order["patience"] - spent}, preview=preview) for order in orders]
        drawing = asyncio.create_task(self._context.draw(service, jobs, asyncio.Event().wait()))
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
