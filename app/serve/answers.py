"""How images are answered: all at once, or as server-sent events in OpenAI's words."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from .context import Context, disconnected
from .faults import FaultError, documented
from .jobs import Job, Picture, Preview, Start, User
from .pictures import drawn, png_of
from .service import Service
from .wishes import ImageWishes, make_jobs
from .worker import Facts

ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images, or with `stream` the events.",
        "content": {"text/event-stream": {}},
    },
    **documented(400, 401, 403, 404, 408, 413, 429, 500, 503),
}
"""Of a route that answers with images."""


class ImageData(BaseModel):
    """One image."""

    b64_json: str
    seed: int


class ImagesResponse(BaseModel):
    """Images, prompt after prompt."""

    created: int
    data: list[ImageData]
    output_format: str
    size: str
    model: str
    engine: str
    steps: int
    milliseconds: float


@dataclass(frozen=True)
class Answer:
    """What is to be answered to one request.

    Args:
        context: the application's.
        request: whose client waits.
        service: the model.
        facts: what it says of itself.
        user: whose turn it takes.
        event: how the names of events begin.
    """

    context: Context
    request: Request
    service: Service
    facts: Facts
    user: User
    event: str

    async def give(self, body: ImageWishes, prompts: Sequence[str], start: Start | None = None) -> Response:
        """Draw prompts, from a picture or from nothing, and answer in the form that the body asks for."""

        def make(preview: Preview | None) -> list[Job]:
            patience = self.context.limits.wait_seconds
            return make_jobs(body, prompts, body.n or 1, self.facts, self.user, patience, preview, start)

        if body.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(
                self._events(body.partial_images or 0, make), media_type="text/event-stream", headers=headers
            )
        begin, jobs = time.perf_counter(), make(None)
        pictures, files = await drawn(self.context, self.service, jobs, disconnected(self.request))
        answer = {
            "created": int(time.time()),
            "data": [_data(file, job) for file, job in zip(files, jobs, strict=True)],
            **self._common(jobs[0], pictures[0]),
            "milliseconds": round(1000 * (time.perf_counter() - begin), 3),
        }
        return JSONResponse(answer)

    async def _events(self, wanted: int, make: Callable[[Preview | None], list[Job]]) -> AsyncIterator[str]:
        """One image after another; a fault is an event, too, since the status is sent by then."""
        previews: asyncio.Queue[npt.NDArray[np.uint8] | None] = asyncio.Queue()
        try:
            for job in make(previews.put_nowait if wanted else None):
                job.made = time.monotonic()  # its turn: it has not waited while those before were drawn
                async for event in self._follow(job, previews, wanted):
                    yield event
        except FaultError as fault:
            self.context.metrics.rejections.labels(fault.code).inc()
            yield f"event: error\ndata: {json.dumps(fault.body())}\n\n"

    async def _follow(
        self, job: Job, previews: asyncio.Queue[npt.NDArray[np.uint8] | None], wanted: int
    ) -> AsyncIterator[str]:
        """The previews of one image as they come, then the image."""
        gone = disconnected(self.request)
        drawing = asyncio.create_task(drawn(self.context, self.service, [job], gone))
        try:
            shown = evenly(job.evaluations - 1, wanted)
            drawing.add_done_callback(lambda _: previews.put_nowait(None))
            for position in range(job.evaluations - 1 if wanted else 0):
                pixels = await previews.get()
                if pixels is None:
                    break
                if position in shown:
                    shot = base64.b64encode(await png_of(pixels)).decode()
                    index = shown.index(position)
                    yield self._event("partial_image", {"b64_json": shot, "partial_image_index": index})
            (picture,), (file,) = await drawing
            while not previews.empty():  # the last foresees the image itself
                previews.get_nowait()
            yield self._event("completed", {**_data(file, job), **self._common(job, picture)})
        finally:
            drawing.cancel()

    def _common(self, job: Job, picture: Picture) -> dict[str, Any]:
        return {
            "output_format": "png",
            "size": self.facts.size,
            "model": self.service.name,
            "engine": picture.engine,
            "steps": job.steps,
        }

    def _event(self, name: str, content: dict[str, Any]) -> str:
        """With what OpenAI's events say of every image."""
        kind = f"{self.event}.{name}"
        about = {
            "created_at": int(time.time()),
            "size": self.facts.size,
            "output_format": "png",
            "quality": "auto",
            "background": "opaque",
        }
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **about, **content})}\n\n"


def _data(file: bytes, job: Job) -> dict[str, Any]:
    return {"b64_json": base64.b64encode(file).decode(), "seed": job.seed}


def evenly(steps: int, wanted: int) -> Sequence[int]:
    """Which of the evaluations before the last are shown, at the most `wanted`."""
    wanted = min(wanted, steps)
    return [(2 * position + 1) * steps // (2 * wanted) for position in range(wanted)]
