"""Pictures for the page: what somebody chose there becomes a request, and goes through the served model's own queue."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from ..serve.context import Context
from ..serve.faults import FaultError, invalid_request
from ..serve.jobs import User
from ..serve.pictures import drawn
from ..serve.service import Service
from ..serve.wishes import GenerationRequest, check_wishes, make_jobs
from ..serve.worker import Facts


@dataclass(frozen=True)
class Drawing:
    """One picture, and what made it.

    Args:
        file: PNG, as the API writes it.
        pixels: (H, W, 3) uint8.
        prompt: of the picture.
        seed: of the picture.
        steps: network evaluations.
        model: by the name it is served under.
        engine: that drew it.
        milliseconds: from the request to the PNGs of all its pictures.
    """

    file: bytes
    pixels: npt.NDArray[np.uint8]
    prompt: str
    seed: int
    steps: int
    model: str
    engine: str
    milliseconds: float


def request_for(prompt: str | list[str], seed: int, steps: int | None, model: str, count: int = 1) -> GenerationRequest:
    """What the API would be asked.

    Raises:
        FaultError: there is no prompt, or something is out of its bounds.
    """
    if isinstance(prompt, str) and not prompt.strip():
        raise FaultError(400, "invalid_request", "There is no prompt: type what to draw.")
    wishes: dict[str, Any] = {"prompt": prompt, "seed": seed, "num_inference_steps": steps, "model": model, "n": count}
    try:
        return GenerationRequest.model_validate(wishes)
    except ValidationError as error:
        raise invalid_request(error.errors()) from error


async def draw(context: Context, user: User, request: GenerationRequest) -> list[Drawing]:
    """Have the served model draw.

    Args:
        context: of the running application.
        user: whose turn it takes.
        request: for one prompt or several.

    Raises:
        FaultError: as the API would answer.
    """
    service, facts = context.service(request.model)
    return await draw_with(context, service, facts, user, request)


async def draw_with(
    context: Context, service: Service, facts: Facts, user: User, request: GenerationRequest
) -> list[Drawing]:
    """The same with a model that need not be among those that the API serves."""
    start = time.perf_counter()
    check_wishes(request, facts)
    prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    jobs = make_jobs(request, prompts, request.n or 1, facts, user, context.limits.wait_seconds)
    pictures, files = await drawn(context, service, jobs)
    milliseconds = 1000 * (time.perf_counter() - start)
    return [
        Drawing(file, picture.pixels, job.prompt, job.seed, job.steps, service.name, picture.engine, milliseconds)
        for file, picture, job in zip(files, pictures, jobs, strict=True)
    ]
