"""The engines that one student could run on here, each in a process of its own beside those that serve."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from ...runtime.engines.manifest import State
from ...runtime.engines.store import list_engines
from ...runtime.errors import FewstepError
from ..psnr import psnr
from ..serve.context import Context
from ..serve.faults import FaultError
from ..serve.jobs import User
from ..serve.service import Service
from ..serve.wishes import GenerationRequest
from ..serve.worker import ModelSettings
from .drawing import Drawing, draw_with

ROUNDS = 5
"""Draws whose median time is told."""


@dataclass(frozen=True)
class Rival:
    """One engine's picture.

    Args:
        engine: its name.
        drawing: its picture, with the median time of `ROUNDS`; None where it failed.
        decibels: PSNR against torch's picture of the same prompt and seed; infinite where they are equal.
        fault: why there is no picture; empty if there is.
    """

    engine: str
    drawing: Drawing | None
    decibels: float
    fault: str = ""


class Rivals:
    """Opens engines when they are first compared, and keeps them.

    Args:
        context: of the running application.
        models: the served models' settings, by name.
    """

    def __init__(self, context: Context, models: Mapping[str, ModelSettings]) -> None:
        self._context, self._models = context, models
        self._opened: dict[tuple[str, str], Service] = {}
        self._lock = asyncio.Lock()

    def names(self, model: str, steps: int | None) -> list[str]:
        """Torch, and every export that would run here at that step count."""
        _, facts = self._context.service(model)
        wanted = (None, steps or facts.default_steps)
        stored = list_engines(self.directory(model))
        ready = {f"{one.target}-{one.precision}" for one in stored if one.state is State.READY and one.steps in wanted}
        return ["torch", *sorted(ready)]

    def directory(self, model: str) -> Path:
        """Where a model lies."""
        return self._models[model].directory

    async def compare(self, user: User, request: GenerationRequest) -> AsyncIterator[Rival]:
        """Each engine's picture of one request, torch's first.

        Raises:
            FaultError: there is no such model, or torch does not draw.
        """
        model = request.model or next(iter(self._models))
        reference: npt.NDArray[np.uint8] | None = None
        for engine in self.names(model, request.num_inference_steps):
            try:
                drawing = await self._draw(model, engine, user, request)
            except (FaultError, FewstepError) as error:
                if reference is None:
                    raise
                yield Rival(engine, None, 0.0, str(error))
                continue
            reference = drawing.pixels if reference is None else reference
            yield Rival(engine, drawing, psnr(drawing.pixels, reference))

    async def close(self) -> None:
        """End all processes that it opened."""
        await asyncio.gather(*(service.close() for service in self._opened.values()))

    async def _draw(self, model: str, engine: str, user: User, request: GenerationRequest) -> Drawing:
        service = await self._service(model, engine)
        assert service.facts is not None
        drawings = [(await draw_with(self._context, service, service.facts, user, request))[0] for _ in range(ROUNDS)]
        times = median(drawing.milliseconds for drawing in drawings)
        return replace(drawings[-1], milliseconds=times, model=model)

    async def _service(self, model: str, engine: str) -> Service:
        async with self._lock:
            if (model, engine) not in self._opened:
                settings = replace(self._models[model], engine=engine, largest_batch=1)
                name, limits, metrics = f"{model} on {engine}", self._context.limits, self._context.metrics
                self._opened[model, engine] = await Service.open(name, settings, limits, metrics)
        return self._opened[model, engine]
