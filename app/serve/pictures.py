"""Pixels as PNG, with what made them in its metadata."""

import asyncio
import io
from collections.abc import Mapping, Sequence

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


async def encode(
    context: Context, service: Service, facts: Facts, jobs: Sequence[Job], pictures: Sequence[Picture]
) -> list[bytes]:
    """The file of each job's picture."""
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
