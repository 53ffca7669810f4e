"""What every route needs: the served models, who asks, and how long a request may take."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.requests import HTTPConnection, Request

from .faults import FaultError
from .jobs import ExpiredError, Job, Picture, User
from .keys import Keys
from .metrics import Metrics
from .service import FullError, Limits, Service, TooManyError
from .worker import EngineError, Facts, RefusedError

logger = logging.getLogger(__name__)
Checker = Callable[[Sequence[str], Sequence[npt.NDArray[np.uint8]]], Sequence[bool]]
"""Takes prompts and their pixels (H, W, 3); tells of each whether it must not be shown. Called in a thread."""
GONE = 499
"""What the log calls the status of a request whose client left; nobody is there to see it."""
REFUSALS = (FullError, TooManyError, ExpiredError, EngineError)


@dataclass
class Context:
    """One running application.

    Args:
        limits: of every queue.
        keys: who may ask; empty: everybody.
        metrics: of the whole application.
        checker: the operator's own, or None.
        origins: of other pages that may ask.
        log_prompts: whether the log tells what is drawn.
        services: by name, in the order given; filled at the start.
        started: seconds since 1970.
    """

    limits: Limits
    keys: Keys
    metrics: Metrics
    checker: Checker | None = None
    origins: Sequence[str] = ()
    log_prompts: bool = False
    services: dict[str, Service] = field(default_factory=dict)
    started: int = field(default_factory=lambda: int(time.time()))

    def service(self, name: str | None) -> tuple[Service, Facts]:
        """A model by name, the first without.

        Raises:
            FaultError: there is none of that name.
        """
        service = next(iter(self.services.values())) if name is None else self.services.get(name)
        if service is None or service.facts is None:
            raise FaultError(404, "model_not_found", f"there is no model {name!r}: GET /v1/models lists them", "model")
        return service, service.facts

    def user(self, connection: HTTPConnection) -> User:
        """Whose turn a request takes, before he names a user: the key's owner's, or else the address's.

        Raises:
            FaultError: a key is needed, and this is none.
        """
        if not self.keys:
            return User(connection.client.host if connection.client else "")
        owner = self.keys.owner(api_key(connection.headers))
        if owner is None:
            raise FaultError(
                401, "invalid_api_key", "give a valid API key as `Authorization: Bearer ...`",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return User(owner)

    async def draw(
        self, service: Service, jobs: Sequence[Job], gone: Coroutine[Any, Any, object] | None = None
    ) -> list[Picture]:
        """Have jobs drawn.

        Args:
            service: the model.
            jobs: all or none are queued.
            gone: ends when nobody waits any longer; without, who calls this cancels it.

        Raises:
            FaultError: the queue is full, these are too many, no engine was free in time, the engine failed, or nobody
                waits any longer.
        """
        if self.log_prompts:
            for job in jobs:
                logger.info("drawing", extra={"model": service.name, "prompt": job.prompt, "seed": job.seed})
        drawing = asyncio.create_task(_all(jobs))
        either: list[asyncio.Task[Any]] = [drawing, *([asyncio.create_task(gone)] if gone else [])]
        try:
            await service.submit(jobs)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done() or drawing.cancelled():
                raise FaultError(GONE, "client_gone", "the client has gone")
            return drawing.result()
        except REFUSALS as error:
            raise self._fault(error) from error
        finally:
            for task in either:
                task.cancel()
            service.discard([job for job in jobs if not job.picture.done() or job.picture.cancelled()])
            for job in jobs:
                if not job.picture.cancelled():
                    job.picture.exception()  # seen, so that asyncio does not complain

    def _fault(self, error: Exception) -> FaultError:
        """What a client is told of one of `REFUSALS`."""
        match error:
            case FullError():
                return FaultError(429, "queue_full", str(error), headers={"Retry-After": str(error.retry_after)})
            case TooManyError():
                return FaultError(400, "too_many_images", str(error), "n")
            case ExpiredError():
                message = f"no engine was free within {self.limits.wait_seconds:g} s: try again"
                return FaultError(503, "waited_too_long", message, headers={"Retry-After": "1"})
            case RefusedError():
                return FaultError(400, "refused", str(error))
        return FaultError(500, "engine_failed", "the engine failed on this request; the log says more")

    async def check(self, prompts: Sequence[str], pictures: Sequence[Picture]) -> None:
        """Refuse what the operator's checker does not let through.

        Raises:
            FaultError: it flagged one.
        """
        if self.checker is None:
            return
        flags = await asyncio.to_thread(self.checker, prompts, [picture.pixels for picture in pictures])
        if any(flags):
            raise FaultError(400, "content_policy_violation", "this server does not show what that prompt gave")


async def _all(jobs: Sequence[Job]) -> list[Picture]:
    return [await job.picture for job in jobs]


def api_key(headers: Mapping[str, str]) -> str:
    """The key of a request; a browser's WebSocket, which cannot set headers, gives it as a subprotocol."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return key.strip()
    offers = [offer.strip() for offer in headers.get("sec-websocket-protocol", "").split(",")]
    return next((offer.removeprefix("key.") for offer in offers if offer.startswith("key.")), "")


async def disconnected(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def context_of(connection: HTTPConnection) -> Context:
    """The application's context; a dependency of the routes, and not a plain function: those are called in a thread."""
    context: Context = connection.app.state.context
    return context
