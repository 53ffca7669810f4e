"""What may be asked for: the body of a request for images, and the jobs that it becomes."""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from ...runtime.edit import DEFAULT_STRENGTH, first_step
from ...runtime.errors import FewstepError
from .faults import FaultError
from .jobs import Job, Preview, Start, User
from .worker import Facts

LONGEST_PROMPT = 1000
MOST_IMAGES = 16
MOST_PROMPTS = 16
LARGEST_SEED = 2**53 - MOST_IMAGES
"""What every JSON reader keeps exactly."""
MOST_STEPS = 100
NOT_ONLY_SPACE = r"[^\s\x1c-\x1f\x85\ufeff]"
"""Something is left without all that Python, Rust or JavaScript takes for space: each knows more than the others."""
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_PROMPT, pattern=NOT_ONLY_SPACE)]


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is whole."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)


class Wishes(BaseModel):
    """How to draw; what is left out is the model's choice."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, max_length=200, description="A name that `/v1/models` lists; the first without.")
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED), WHOLE] | None = Field(
        None, description="Of the first image; random without."
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=MOST_STEPS), WHOLE] | None = Field(
        None, description="Network evaluations."
    )
    guidance_scale: float | None = Field(None, ge=1, le=100, description="For models that take one.")
    negative_prompt: str | None = Field(None, max_length=LONGEST_PROMPT, description="For models with guidance.")


class ImageWishes(Wishes):
    """OpenAI's fields that a diffusion model can honour, and a few more."""

    n: Annotated[int, Field(ge=1, le=MOST_IMAGES), WHOLE] | None = Field(
        None, description="Images a prompt, their seeds counting up."
    )
    size: str | None = Field(None, pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="`auto`, or the model's own.")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    user: str | None = Field(None, max_length=200, description="Whose turn it takes: users are served in turns.")
    stream: bool | None = Field(None, description="Events as OpenAI sends them, image after image.")
    partial_images: Annotated[int, Field(ge=0, le=3), WHOLE] | None = Field(
        None, description="Previews, where engine and steps allow them."
    )


class GenerationRequest(ImageWishes):
    """The body of `POST /v1/images/generations`."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MOST_PROMPTS)]


class EditRequest(ImageWishes):
    """The form of `POST /v1/images/edits`, whose numbers come as text."""

    model_config = ConfigDict(strict=False)

    image: UploadFile = Field(description="PNG, JPEG or WebP.")
    prompt: Prompt
    strength: float = Field(
        DEFAULT_STRENGTH, gt=0, lt=1, description="The share of the steps that is taken: how little of the image stays."
    )


def check_size(size: str | None, facts: Facts) -> None:
    """Refuse another size than the model's.

    Raises:
        FaultError: it is another.
    """
    own = facts.size
    if size not in (None, "auto", own):
        raise FaultError(400, "unsupported_size", f"this model draws {own} only", "size")


def check_wishes(wishes: Wishes, facts: Facts) -> None:
    """Refuse what the model does not know.

    Raises:
        FaultError: the step count or scale is not one of the model's.
    """
    steps, scale = wishes.num_inference_steps, wishes.guidance_scale
    if steps is not None and facts.steps and steps not in facts.steps:
        known = " or ".join(map(str, facts.steps))
        raise FaultError(400, "unsupported_steps", f"this model takes {known} steps", "num_inference_steps")
    if scale is not None and facts.guidance is None and scale != 1:
        raise FaultError(400, "unsupported_guidance", "this model has its guidance built in", "guidance_scale")
    if scale is not None and facts.guidance and not facts.guidance[0] <= scale <= facts.guidance[1]:
        low, high = facts.guidance
        raise FaultError(400, "unsupported_guidance", f"this model takes {low:g} to {high:g}", "guidance_scale")
    if wishes.negative_prompt and facts.kind != "teacher":
        raise FaultError(400, "unsupported_negative", "this model has no negative prompt", "negative_prompt")


def check_edit(wishes: EditRequest, facts: Facts, pixels: npt.NDArray[np.uint8]) -> Start:
    """Where an edit starts.

    Raises:
        FaultError: the model has no image-to-image, or the strength leaves no step.
    """
    if not facts.edits:
        raise FaultError(400, "unsupported_edit", "this model has no image-to-image: GET /v1/models says which have")
    steps = wishes.num_inference_steps or facts.default_steps
    try:
        return Start(pixels, wishes.strength, steps - first_step(steps, wishes.strength))
    except FewstepError as error:
        raise FaultError(400, "unsupported_strength", str(error), "strength") from error


def make_jobs(
    wishes: Wishes,
    prompts: Sequence[str],
    count: int,
    facts: Facts,
    user: User,
    patience: float,
    preview: Preview | None = None,
    start: Start | None = None,
) -> list[Job]:
    """A job an image, prompt after prompt; the seeds of each prompt's images count up."""
    first = secrets.randbelow(2**32) if wishes.seed is None else wishes.seed
    return [
        Job(
            prompt=prompt,
            seed=first + position,
            steps=wishes.num_inference_steps or facts.default_steps,
            guidance=wishes.guidance_scale,
            negative=wishes.negative_prompt or "",
            user=user,
            patience=patience,
            preview=preview,
            start=start,
        )
        for prompt in prompts
        for position in range(count)
    ]
