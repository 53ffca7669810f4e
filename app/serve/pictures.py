"""Pixels as PNG, with what made them in its metadata."""

import asyncio
import struct
import zlib
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .context import Context
from .jobs import Job, Picture
from .service import Service

FAST = 1
"""Of zlib's levels: a little larger, several times quicker."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
RGB = 2
"""Of PNG's kinds of colour."""
UP = 2
"""Of PNG's filters: a row is written as its difference from the one above."""
PLAIN = bytes(5)
"""After a text's key: not compressed, of no language, and with no other name for the key."""
SMALL = 128 * 128
"""Pixels of a picture encoded sooner than a thread would begin; a larger one would hold up other requests."""


def png(pixels: npt.NDArray[np.uint8], metadata: Mapping[str, str]) -> bytes:
    """A PNG of (H, W, 3) uint8, with a text chunk for every entry, whose key is Latin-1 of at most 79 letters.

    Written here, because Pillow takes half a millisecond longer between two drawings, a sixth of what a server may add,
    and up to twice the time for pictures of any size, to choose a filter for every row; its files are no smaller.
    """
    height, width, channels = pixels.shape
    flat = pixels.reshape(height, width * channels)
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = UP
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, RGB, 0, 0, 0)
    texts = [_chunk(b"iTXt", key.encode("latin-1") + PLAIN + text.encode()) for key, text in metadata.items()]
    data = _chunk(b"IDAT", zlib.compress(rows.data, FAST))
    return b"".join((SIGNATURE, _chunk(b"IHDR", header), *texts, data, _chunk(b"IEND", b"")))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


async def png_of(pixels: npt.NDArray[np.uint8], metadata: Mapping[str, str] | None = None) -> bytes:
    """`png`, in a thread unless the picture is small."""
    if pixels.shape[0] * pixels.shape[1] <= SMALL:
        return png(pixels, metadata or {})
    return await asyncio.to_thread(png, pixels, metadata or {})


async def drawn(
    context: Context, service: Service, jobs: Sequence[Job], gone: Coroutine[Any, Any, object] | None = None
) -> tuple[list[Picture], list[bytes]]:
    """Have jobs drawn, and checked: their pictures, and those as files.

    Raises:
        FaultError: as of `Context.draw` and `Context.check`.
    """
    pictures = await context.draw(service, jobs, gone)
    await context.check([job.prompt for job in jobs], pictures)
    return pictures, await _encode(context, service, jobs, pictures)


async def _encode(context: Context, service: Service, jobs: Sequence[Job], pictures: Sequence[Picture]) -> list[bytes]:
    with context.metrics.encoding.labels(service.name).time():
        return [
            await png_of(picture.pixels, metadata(service, job, picture))
            for job, picture in zip(jobs, pictures, strict=True)
        ]


def metadata(service: Service, job: Job, picture: Picture) -> dict[str, str]:
    """What made a picture: enough to make it again, with what an edit starts from."""
    from ... import __version__

    made = {
        "prompt": job.prompt,
        "negative_prompt": job.negative,
        "seed": str(job.seed),
        "num_inference_steps": str(job.steps),
        "guidance_scale": "" if job.guidance is None else f"{job.guidance:g}",
        "strength": f"{job.start.strength:g}" if job.start else "",
        "model": service.name,
        "weights": picture.weights,
        "engine": picture.engine,
        "software": f"fewstep {__version__}",
    }
    return {key: value for key, value in made.items() if value}
