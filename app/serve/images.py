"""`POST /v1/images/generations` and `/v1/images/edits`, as OpenAI's clients call them."""

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import Response

from .answers import STREAMED, Answer, ImagesResponse
from .context import Context, context_of
from .faults import documented
from .uploads import picture_of
from .wishes import EditRequest, GenerationRequest, check_edit, check_size, check_wishes, make_jobs

router = APIRouter()


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
    user = context.user(request, body.user)
    service, facts = context.service(body.model)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    check_size(body.size, facts)
    check_wishes(body, facts)
    answer = Answer(context, request, service, facts, "image_generation")
    return await answer.give(
        body, lambda preview: make_jobs(body, prompts, body.n or 1, facts, user, context.limits.wait_seconds, preview)
    )


@router.post(
    "/v1/images/edits",
    response_model=ImagesResponse,
    responses=STREAMED | documented(400, 401, 404, 408, 413, 429, 500, 503),
    summary="Images from an image and a prompt",
)
async def edit(
    body: Annotated[EditRequest, Form()], request: Request, context: Annotated[Context, Depends(context_of)]
) -> Response:
    """Draw `n` images that start from `image`, scaled and cropped to the model's size; events as for generations.

    `strength` is the share of the steps that is taken: the larger, the less of the picture stays.
    """
    user = context.user(request, body.user)
    service, facts = context.service(body.model)
    check_size(body.size, facts)
    check_wishes(body, facts)
    start = check_edit(body, facts, await picture_of(body.image, facts))
    answer = Answer(context, request, service, facts, "image_edit")
    return await answer.give(
        body,
        lambda preview: make_jobs(
            body, [body.prompt], body.n or 1, facts, user, context.limits.wait_seconds, preview, start
        ),
    )
