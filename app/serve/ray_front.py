"""A replica that speaks HTTP: the application of `server.py`, drawn for by the replicas of `ray_models.py`."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.errors import FewstepError
from .command import log_lines
from .context import Checker
from .faults import FaultError
from .jobs import ExpiredError, Job
from .keys import Keys, is_loopback
from .ray_metrics import publish
from .ray_models import Reply, order_of
from .ray_settings import RaySettings
from .server import LOOPBACK_NAMES, ServerSettings, create_app
from .service import MOST_ATTEMPTS, FullError, fail
from .worker import EngineError, Facts

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)


class Front:
    """The deployment.

    Args:
        settings: the whole file.
        keys: who may ask.
        checker: the operator's own, or None.
        models: the handle of the deployment that draws.
    """

    def __init__(self, settings: RaySettings, keys: Keys, checker: Checker | None, models: Any) -> None:
        log_lines()
        self._settings = settings
        open_to_all = is_loopback(settings.host) and not keys
        self._app = create_app(
            ServerSettings(
                models={},
                limits=settings.limits,
                keys=keys,
                origins=settings.origins,
                hosts=LOOPBACK_NAMES if open_to_all else (),
                checker=checker,
            )
        )
        self._models = models

    async def reconfigure(self, config: Mapping[str, Sequence[str]]) -> None:
        """Ask for every model, which opens it; Ray calls this before the first request.

        Raises:
            FewstepError: one does not open.
        """
        context = self._app.state.context
        for name in config["models"]:
            handle = self._models if self._settings.all_fit else self._models.options(multiplexed_model_id=name)
            facts = await handle.facts.remote(name)
            if isinstance(facts, str):
                raise FewstepError(facts)
            context.services[name] = RemoteService(name, facts, handle.options(stream=True))
        self._publishing = asyncio.create_task(publish(context.metrics.registry))

    def __serve_build_asgi_app__(self) -> "FastAPI":
        return self._app

    async def __del__(self) -> None:
        self._publishing.cancel()


class RemoteService:
    """A model that other replicas draw; to the application what a `Service` is.

    Args:
        name: of the model.
        facts: what it says of itself.
        models: the handle that its requests go to, which streams.
    """

    ready = True
    """Ray replaces what dies; requests that find nobody are answered 503."""

    def __init__(self, name: str, facts: Facts, models: Any) -> None:
        self.name, self.facts, self._models = name, facts, models

    async def submit(self, jobs: Sequence[Job]) -> None:
        """Send jobs to a replica; how it fares shows in their pictures."""
        following = asyncio.create_task(self._follow(jobs))
        jobs[0].picture.add_done_callback(lambda _: following.cancel())  # nobody waits any longer: the replica hears

    def discard(self, jobs: Sequence[Job]) -> None:
        """Forget jobs that nobody waits for any more."""
        for job in jobs:
            job.picture.cancel()

    async def close(self) -> None:
        """Nothing here is to be closed."""

    async def _follow(self, jobs: Sequence[Job]) -> None:
        """Have jobs drawn; a replica that dies over them is not the end: another draws the same pictures."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError

        try:
            for _ in range(MOST_ATTEMPTS):
                try:
                    await self._ask(jobs)
                    return
                except RayActorError:
                    logger.error("a replica ended", extra={"model": self.name})
            fail(jobs, EngineError("its replica ended twice"))
        except FaultError as fault:
            fail(jobs, fault)
        except TimeoutError:
            fail(jobs, ExpiredError())
        except BackPressureError:
            fail(jobs, FullError(1))
        except Exception as error:  # a fault of ours or of Ray: those who wait must hear of it
            logger.exception("drawing failed")
            fail(jobs, EngineError(type(error).__name__))

    async def _ask(self, jobs: Sequence[Job]) -> None:
        """Follow the replies of one replica.

        Raises:
            FaultError: it refused.
            TimeoutError: no replica took the jobs in time.
        """
        preview, orders = jobs[0].preview, [order_of(job) for job in jobs]
        replies = self._models.draw.remote(self.name, orders, preview is not None)
        try:
            async with asyncio.timeout(orders[0]["patience"]):
                first: Reply = await anext(replies)
            for job in jobs:
                job.started = True  # as far as is known here
            async for reply in _chain(first, replies):
                if isinstance(reply, np.ndarray) and preview:
                    preview(reply)
                elif isinstance(reply, dict):
                    raise FaultError(**reply)
                elif isinstance(reply, list):
                    for job, picture in zip(jobs, reply, strict=True):
                        if not job.picture.done():
                            job.picture.set_result(picture)
        finally:
            replies.cancel()


async def _chain(first: Reply, rest: AsyncIterator[Reply]) -> AsyncIterator[Reply]:
    yield first
    async for reply in rest:
        yield reply
