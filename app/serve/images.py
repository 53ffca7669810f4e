"""`POST /v1/images/generations`, as OpenAI's clients call it."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from .context import Context, context_of, disconnected
from .faults import FaultError, documented
from .jobs import Job, Picture
from .pictures import png
from .service import Service
from .wishes import GenerationRequest, check_size, check_wishes, make_jobs
from .worker import Facts

router = APIRouter()
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images, or with `stream` the events.",
        "content": {"text/event-stream": {}},
    }
}


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


@router.post(
    "/v1/images/generations",
    response_model=ImagesResponse,
    responses=STREAMED | documented(400, 401, 404, 408, 413, 429, 500, 503),
    summary="Images from prompts",
)
async def generate(
    body: GenerationRequest, request: Request, context: Annotated[Context, Depends(context_of)]
) -> Response:
    """Draw `n` images for each prompt; one seed gives one image, whatever else is drawn at the time.

    With `stream`, the answer is a stream of server-sent events: for each image as many `image_generation.partial_image`
    as asked for, then `image_generation.completed`.
    """
    start = time.perf_counter()
    user = context.user(request, body.user)
    service, facts = context.service(body.model)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    check_size(body.size, facts)
    check_wishes(body, facts)
    if body.stream:
        return _stream(context, service, facts, body, prompts, user, request)
    jobs = make_jobs(body, prompts, body.n or 1, facts, user, context.limits.wait_seconds)
    pictures = await context.draw(service, jobs, disconnected(request))
    await context.check([job.prompt for job in jobs], pictures)
    files = await _encode(context, service, facts, jobs, pictures)
    answer = {
        "created": int(time.time()),
        "data": [
            {"b64_json": base64.b64encode(file).decode(), "seed": job.seed}
            for file, job in zip(files, jobs, strict=True)
        ],
        **_common(service, facts, jobs[0], pictures[0]),
        "milliseconds": round(1000 * (time.perf_counter() - start), 3),
    }
    return JSONResponse(answer)


def _common(service: Service, facts: Facts, job: Job, picture: Picture) -> dict[str, Any]:
    return {
        "output_format": "png",
        "size": f"{facts.width}x{facts.height}",
        "model": service.name,
        "engine": picture.engine,
        "steps": job.steps,
    }


async def _encode(
    context: Context, service: Service, facts: Facts, jobs: Sequence[Job], pictures: Sequence[Picture]
) -> list[bytes]:
    def encode() -> list[bytes]:
        return [
            png(picture.pixels, metadata(service, facts, job, picture))
            for job, picture in zip(jobs, pictures, strict=True)
        ]

    with context.metrics.encoding.labels(service.name).time():
        return await asyncio.to_thread(encode)


def metadata(service: Service, facts: Facts, job: Job, picture: Picture) -> dict[str, str]:
    """What made a picture: enough to make it again."""
    from ... import __version__

    made = {
        "prompt": job.prompt,
        "negative_prompt": job.negative,
        "seed": str(job.seed),
        "num_inference_steps": str(job.steps),
        "guidance_scale": "" if job.guidance is None else f"{job.guidance:g}",
        "model": service.name,
        "weights": facts.weights,
        "engine": picture.engine,
        "software": f"fewstep {__version__}",
    }
    return {key: value for key, value in made.items() if value}


def _stream(
    context: Context,
    service: Service,
    facts: Facts,
    body: GenerationRequest,
    prompts: Sequence[str],
    user: str,
    request: Request,
) -> StreamingResponse:
    previews: asyncio.Queue[npt.NDArray[np.uint8]] = asyncio.Queue()
    preview = previews.put_nowait if body.partial_images else None
    jobs = make_jobs(body, prompts, body.n or 1, facts, user, context.limits.wait_seconds, preview)

    async def events() -> AsyncIterator[str]:
        """One image after another; a fault is an event, too, since the status is sent by then."""
        try:
            for job in jobs:
                async for event in _follow(context, service, facts, job, previews, body.partial_images or 0, request):
                    yield event
        except FaultError as fault:
            context.metrics.rejections.labels(fault.code).inc()
            yield f"event: error\ndata: {json.dumps(fault.body())}\n\n"

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


async def _follow(
    context: Context,
    service: Service,
    facts: Facts,
    job: Job,
    previews: asyncio.Queue[npt.NDArray[np.uint8]],
    wanted: int,
    request: Request,
) -> AsyncIterator[str]:
    """The previews of one image as they come, then the image."""
    drawing = asyncio.create_task(context.draw(service, [job], disconnected(request)))
    try:
        shown = evenly(job.steps - 1, wanted)
        for position in range(job.steps - 1 if wanted else 0):
            preview = asyncio.create_task(previews.get())
            await asyncio.wait([preview, drawing], return_when=asyncio.FIRST_COMPLETED)
            if not preview.done():
                preview.cancel()
                break
            if position in shown:
                picture = base64.b64encode(png(preview.result(), {})).decode()
                index = shown.index(position)
                yield _event("partial_image", {"b64_json": picture, "partial_image_index": index, **_about(facts)})
        pictures = await drawing
        while not previews.empty():  # the last foresees the image itself
            previews.get_nowait()
        await context.check([job.prompt], pictures)
        file = (await _encode(context, service, facts, [job], pictures))[0]
        made = {"b64_json": base64.b64encode(file).decode(), "seed": job.seed}
        yield _event("completed", {**made, **_about(facts), **_common(service, facts, job, pictures[0])})
    finally:
        drawing.cancel()


def evenly(steps: int, wanted: int) -> list[int]:
    """Which of the evaluations before the last are shown, at the most `wanted`."""
    wanted = min(wanted, steps)
    return [(2 * position + 1) * steps // (2 * wanted) for position in range(wanted)]


def _about(facts: Facts) -> dict[str, Any]:
    """What OpenAI's events say of every image."""
    return {
        "created_at": int(time.time()),
        "size": f"{facts.width}x{facts.height}",
        "output_format": "png",
        "quality": "auto",
        "background": "opaque",
    }


def _event(name: str, content: dict[str, Any]) -> str:
    kind = f"image_generation.{name}"
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **content})}\n\n"
