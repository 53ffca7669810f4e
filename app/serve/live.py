"""`/v1/images/live`: a picture that follows the typing. The newest prompt wins, and work that is stale is dropped."""

import asyncio
import base64
import contextlib
import logging
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, WebSocket, WebSocketDisconnect
from pydantic import Field, ValidationError

from .access import report
from .context import GONE, Context, context_of
from .door import require_same_origin
from .faults import SERVER_FAILED, FaultError, invalid_request
from .jobs import Job, User
from .pictures import drawn
from .wishes import Prompt, Wishes, check_wishes, make_jobs

router = APIRouter()
PROTOCOL = "fewstep"
LONGEST_TEXT = 16384
"""Characters of a message."""
POLICY_VIOLATION = 1008
UNSUPPORTED = 1003

logger = logging.getLogger(__name__)


class LiveRequest(Wishes):
    """One message: what to draw now; `id` comes back with the picture."""

    prompt: Prompt
    id: int = Field(0, ge=0, le=2**53)


@router.websocket("/v1/images/live")
async def live(socket: WebSocket, context: Annotated[Context, Depends(context_of)]) -> None:
    """Answer each `{"prompt", "id", ...}` with `{"id", "b64_json", "seed", "milliseconds"}` or `{"id", "error"}`."""
    try:
        user = context.user(socket)
        require_same_origin(socket.headers, context.origins)
    except FaultError as fault:
        context.metrics.rejections.labels(fault.code).inc()
        await socket.close(POLICY_VIOLATION, fault.message)
        return
    await socket.accept(PROTOCOL if PROTOCOL in socket.scope["subprotocols"] else None)
    await Conversation(socket, context, user).follow()


class Conversation:
    """One client's messages: one picture is drawn at a time, so who types faster sees every picture that is made."""

    def __init__(self, socket: WebSocket, context: Context, user: User) -> None:
        self._socket, self._context, self._user = socket, context, user
        self._newest: asyncio.Queue[str] = asyncio.Queue(1)
        self._job: Job | None = None

    async def follow(self) -> None:
        """Read messages until the client leaves."""
        drawing = asyncio.create_task(self._answer_all())
        try:
            while (message := await self._socket.receive())["type"] == "websocket.receive":
                if message.get("text") is None:
                    await self._socket.close(UNSUPPORTED, "a message is text")
                    return
                self._take(message["text"])
        finally:
            drawing.cancel()

    def _take(self, text: str) -> None:
        """Forget what no engine has begun: nobody wants to see it any more."""
        if self._newest.full():
            self._newest.get_nowait()
        self._newest.put_nowait(text)
        if self._job and not self._job.started:
            self._job.picture.cancel()

    async def _answer_all(self) -> None:
        with contextlib.suppress(WebSocketDisconnect):  # the client is gone
            while True:
                text = await self._newest.get()
                begin = time.perf_counter()
                status, answer = await self._answer(text)
                if status != GONE:
                    await self._send(answer)
                report(self._context.metrics, self._socket.scope, status, time.perf_counter() - begin)

    async def _send(self, answer: dict[str, Any]) -> None:
        try:
            await self._socket.send_json(answer)
        except RuntimeError as error:  # starlette's word for a socket that is closed
            raise WebSocketDisconnect from error

    async def _answer(self, text: str) -> tuple[int, dict[str, Any]]:
        """The answer to one message, with the status that it would have over HTTP; `GONE` if a newer came before."""
        number = 0
        try:
            request = _parse(text)
            number = request.id
            return 200, {"id": number, **await self._draw(request)}
        except FaultError as error:
            fault = error
        except Exception:
            logger.exception("a fault of the server")
            fault = SERVER_FAILED
        self._context.metrics.rejections.labels(fault.code).inc()
        return fault.status, {"id": number, **fault.body()}

    async def _draw(self, request: LiveRequest) -> dict[str, Any]:
        start, context = time.perf_counter(), self._context
        service, facts = context.service(request.model)
        check_wishes(request, facts)
        (self._job,) = jobs = make_jobs(request, [request.prompt], 1, facts, self._user, context.limits.wait_seconds)
        try:
            _, (file,) = await drawn(context, service, jobs)
        finally:
            self._job = None
        seconds = time.perf_counter() - start
        return {
            "b64_json": base64.b64encode(file).decode(),
            "seed": jobs[0].seed,
            "milliseconds": round(1000 * seconds, 3),
        }


def _parse(text: str) -> LiveRequest:
    if len(text) > LONGEST_TEXT:
        raise FaultError(413, "too_large", f"a message has {LONGEST_TEXT} characters at the most")
    try:
        return LiveRequest.model_validate_json(text)
    except ValidationError as error:
        raise invalid_request(error.errors()) from error
