"""The application: its routes, the layers around them, and models that open before the first request."""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ... import __version__
from ...runtime.errors import FewstepError
from . import faults, images, live, operations
from .access import Access
from .context import Checker, Context
from .document import describe
from .door import Door
from .keys import Keys
from .metrics import Metrics
from .service import Limits, Service
from .worker import ModelSettings

logger = logging.getLogger(__name__)
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ServerSettings:
    """What is served, and to whom.

    Args:
        models: by name; the first is what a request without a name gets.
        replicas: processes a model.
        limits: of every queue.
        keys: who may ask; empty: everybody.
        origins: of other pages that browsers may let ask.
        hosts: names that a request may call this server by; empty: any.
        checker: the operator's own, or None.
        log_prompts: whether the log tells what is drawn.
    """

    models: Mapping[str, ModelSettings]
    replicas: int = 1
    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=Keys)
    origins: Sequence[str] = ()
    hosts: Sequence[str] = ()
    checker: Checker | None = None
    log_prompts: bool = False


def create_app(settings: ServerSettings) -> FastAPI:
    """Make the application; its models open when it starts, unless `open_models` was called before."""
    metrics = Metrics()
    context = Context(settings.limits, settings.keys, metrics, settings.checker, settings.origins, settings.log_prompts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await open_models(app)
        try:
            yield
        finally:
            await close_models(app)

    app = FastAPI(title="fewstep", version=__version__, lifespan=lifespan, redoc_url=None, docs_url=None)
    app.state.context, app.state.settings = context, settings
    for part in (images, live, operations):
        app.include_router(part.router)
    faults.install(app, metrics)
    describe(app, context)
    app.add_middleware(Door, context=context)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    if settings.hosts:  # a page elsewhere may have its own name lead here
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))
    app.add_middleware(Access, metrics=metrics)
    return app


async def open_models(app: FastAPI) -> None:
    """Open all models that are not open.

    Raises:
        FewstepError: one does not open; then none is left.
    """
    context: Context = app.state.context
    settings: ServerSettings = app.state.settings
    try:
        for name, model in settings.models.items():
            if name not in context.services:
                service = await Service.open(name, model, settings.limits, context.metrics, settings.replicas)
                context.services[name] = service
                logger.info("ready", extra={"model": name, **_told(service)})
    except FewstepError:
        await close_models(app)
        raise


async def close_models(app: FastAPI) -> None:
    """End all processes, after what they are drawing."""
    context: Context = app.state.context
    for service in context.services.values():
        await service.close()


async def reload(app: FastAPI) -> None:
    """Open all models anew; one that does not open stays as it was, and the log says why."""
    context: Context = app.state.context
    for name, service in context.services.items():
        try:
            await service.reload()
        except Exception as error:  # the next model may open
            context.metrics.reloads.labels(name, "failed").inc()
            logger.error("not reloaded", extra={"model": name, "cause": str(error)})
        else:
            app.openapi_schema = None  # it tells what the model was
            context.metrics.reloads.labels(name, "done").inc()
            logger.info("reloaded", extra={"model": name, **_told(service)})


def _told(service: Service) -> dict[str, Any]:
    facts = service.facts
    assert facts is not None
    return {"engine": facts.engine, "weights": facts.weights, "processes": service.process_ids}
