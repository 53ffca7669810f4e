"""`/v1/images/live`: a picture that follows the typing. The newest prompt wins, and work that is stale is dropped."""

import asyncio
import base64
import contextlib
import time
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, WebSocket, WebSocketDisconnect
from pydantic import Field, ValidationError

from .context import Context, context_of
from .faults import FaultError, invalid_request
from .jobs import Job
from .pictures import drawn
from .wishes import Prompt, Wishes, check_wishes, make_jobs

router = APIRouter()
PROTOCOL = "fewstep"
LONGEST_MESSAGE = 16384
POLICY_VIOLATION = 1008


class LiveRequest(Wishes):
    """One message: what to draw now; `id` comes back with the picture."""

    prompt: Prompt
    id: int = Field(0, ge=0, le=2**53)


@router.websocket("/v1/images/live")
async def live(socket: WebSocket, context: Annotated[Context, Depends(context_of)]) -> None:
    """Answer each `{"prompt", "id", ...}` with `{"id", "b64_json", "seed", "milliseconds"}` or `{"id", "error"}`."""
    try:
        user = context.user(socket)
    except FaultError as fault:
        await socket.close(POLICY_VIOLATION, fault.message)
        return
    if not same_origin(socket, context):
        await socket.close(POLICY_VIOLATION, "this page is not allowed to ask here")
        return
    await socket.accept(PROTOCOL if PROTOCOL in socket.scope["subprotocols"] else None)
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client is gone
        await _follow(socket, context, user)


def same_origin(socket: WebSocket, context: Context) -> bool:
    """Whether the page that asks comes from here, or from an origin that the operator allowed.

    Browsers let any page open a WebSocket to any server, this machine's own included.
    """
    origin = socket.headers.get("origin")
    return origin is None or origin in context.origins or urlsplit(origin).netloc == socket.headers.get("host")


async def _follow(socket: WebSocket, context: Context, user: str) -> None:
    """Read messages for ever, and draw one at a time: who types faster sees every picture that is made."""
    newest: asyncio.Queue[str] = asyncio.Queue(1)
    drawing = asyncio.create_task(_answer_all(socket, context, user, newest))
    try:
        while True:
            text = await socket.receive_text()
            if newest.full():
                newest.get_nowait()
            newest.put_nowait(text)
    finally:
        drawing.cancel()


async def _answer_all(socket: WebSocket, context: Context, user: str, newest: asyncio.Queue[str]) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client is gone
        while True:
            await _answer(socket, context, user, await newest.get())


async def _answer(socket: WebSocket, context: Context, user: str, text: str) -> None:
    number = 0
    try:
        request = _parse(text)
        number = request.id
        await socket.send_json({"id": number, **await _draw(context, request, user)})
    except FaultError as fault:
        context.metrics.rejections.labels(fault.code).inc()
        await socket.send_json({"id": number, **fault.body()})


def _parse(text: str) -> LiveRequest:
    if len(text) > LONGEST_MESSAGE:
        raise FaultError(413, "too_large", f"a message has {LONGEST_MESSAGE} characters at the most")
    try:
        return LiveRequest.model_validate_json(text)
    except ValidationError as error:
        raise invalid_request(error.errors()) from error


async def _draw(context: Context, request: LiveRequest, user: str) -> dict[str, Any]:
    start = time.perf_counter()
    service, facts = context.service(request.model)
    check_wishes(request, facts)
    jobs: list[Job] = make_jobs(request, [request.prompt], 1, facts, user, context.limits.wait_seconds)
    _, (file,) = await drawn(context, service, facts, jobs, asyncio.Event().wait())
    seconds = time.perf_counter() - start
    return {
        "b64_json": base64.b64encode(file).decode(),
        "seed": jobs[0].seed,
        "milliseconds": round(1000 * seconds, 3),
    }
