"""Pixels as PNG, with what made them in its metadata."""

import asyncio
import io
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .context import Context
from .jobs import Job, Picture
from .service import Service
from .worker import Facts

FAST = 1
"""Of zlib's levels: a little larger, several times quicker."""
SMALL = 128 * 128
"""Pixels of a picture encoded sooner than a thread would begin; a larger one would hold up other requests."""


def png(pixels: npt.NDArray[np.uint8], metadata: Mapping[str, str]) -> bytes:
    """A PNG of (H, W, 3) uint8, with a text chunk for every entry."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=FAST, pnginfo=info)
    return file.getvalue()


async def png_of(pixels: npt.NDArray[np.uint8], metadata: Mapping[str, str] | None = None) -> bytes:
    """`png`, in a thread unless the picture is small."""
    if pixels.shape[0] * pixels.shape[1] <= SMALL:
        return png(pixels, metadata or {})
    return await asyncio.to_thread(png, pixels, metadata or {})


async def drawn(
    context: Context, service: Service, facts: Facts, jobs: Sequence[Job], gone: Coroutine[Any, Any, object]
) -> tuple[list[Picture], list[bytes]]:
    """Have jobs drawn, and checked: their pictures, and those as files.

    Raises:
        FaultError: as of `Context.draw` and `Context.check`.
    """
    pictures = await context.draw(service, jobs, gone)
    await context.check([job.prompt for job in jobs], pictures)
    return pictures, await _encode(context, service, facts, jobs, pictures)


async def _encode(
    context: Context, service: Service, facts: Facts, jobs: Sequence[Job], pictures: Sequence[Picture]
) -> list[bytes]:
    with context.metrics.encoding.labels(service.name).time():
        return [
            await png_of(picture.pixels, metadata(service, facts, job, picture))
            for job, picture in zip(jobs, pictures, strict=True)
        ]


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
