"""`POST /v1/images/generations` and `/v1/images/edits`, as OpenAI's clients call them."""

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import Response

from .answers import ANSWERS, Answer, ImagesResponse
from .context import Context, context_of
from .uploads import picture_of
from .wishes import EditRequest, GenerationRequest, ImageWishes, check_edit, check_size, check_wishes

router = APIRouter()


@router.post(
    "/v1/images/generations",
    response_model=ImagesResponse,
    responses=ANSWERS,
    summary="Images from prompts",
)
async def generate(
    body: GenerationRequest, request: Request, context: Annotated[Context, Depends(context_of)]
) -> Response:
    """Draw `n` images for each prompt; one seed gives one image, whatever else is drawn at the time.

    With `stream`, the answer is a stream of server-sent events: for each image as many `image_generation.partial_image`
    as asked for, then `image_generation.completed`.
    """
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    return await _answer(context, request, body, "image_generation").give(body, prompts)


@router.post(
    "/v1/images/edits",
    response_model=ImagesResponse,
    responses=ANSWERS,
    summary="Images from an image and a prompt",
)
async def edit(
    body: Annotated[EditRequest, Form(media_type="multipart/form-data")],
    request: Request,
    context: Annotated[Context, Depends(context_of)],
) -> Response:
    """Draw `n` images that start from `image`, scaled and cropped to the model's size; events as for generations.

    `strength` is the share of the steps that is taken: the larger, the less of the picture stays.
    """
    answer = _answer(context, request, body, "image_edit")
    start = check_edit(body, answer.facts, await picture_of(body.image, answer.facts))
    return await answer.give(body, [body.prompt], start)


def _answer(context: Context, request: Request, body: ImageWishes, event: str) -> Answer:
    """To a request that the model can serve; `FaultError` if it cannot."""
    user = request.user._replace(name=body.user or "")
    service, facts = context.service(body.model)
    check_size(body.size, facts)
    check_wishes(body, facts)
    return Answer(context, request, service, facts, user, event)
