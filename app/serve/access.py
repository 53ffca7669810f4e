"""Around every request: a bound on its body, a clock, and a line in the log that holds no prompt."""

import asyncio
import json
import logging
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .faults import SERVER_FAILED, FaultError, answer, refusal
from .metrics import Metrics

LARGEST_BODY = 64 * 1024
LARGEST_UPLOAD = 8 * 1024 * 1024
EDITS = "/v1/images/edits"
"""The path whose bodies hold pictures."""
BODY_SECONDS = 10.0
"""In which a body must have arrived."""
KNOWN = (
    "/v1/images/generations",
    EDITS,
    "/v1/images/live",
    "/v1/models",
    "/health",
    "/ready",
    "/metrics",
    "/openapi.json",
)
"""Paths that metrics name; whatever else a client makes up is `other`."""

logger = logging.getLogger("fewstep.access")


class Access:
    """The outermost layer of the application.

    Args:
        app: what it is around.
        metrics: counts and times.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0  # until the answer begins

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, _bounded(receive, scope), note)
        except FaultError as fault:
            refused = refusal(fault, self.metrics)
            if not status:
                await refused(scope, receive, note)
        except Exception:
            logger.exception("a fault of the server")
            if not status:
                await answer(SERVER_FAILED)(scope, receive, note)
        finally:
            report(self.metrics, scope, status or 500, time.perf_counter() - begin)


def report(metrics: Metrics, scope: Scope, status: int, seconds: float) -> None:
    """Count a request, or a message of a WebSocket, and log it."""
    path = scope["path"] if scope["path"] in KNOWN else "other"
    metrics.requests.labels(path, str(status)).observe(seconds)
    address, method = (scope.get("client") or ("",))[0], scope.get("method", "WEBSOCKET")
    facts = {"method": method, "path": path, "status": status, "milliseconds": round(1000 * seconds, 2)}
    logger.info("request", extra={**facts, "address": address})


def _bounded(receive: Receive, scope: Scope) -> Receive:
    """The same, refusing a body that is too large or too slow.

    Raises:
        FaultError: it is.
    """
    size, complete, end = 0, False, asyncio.get_running_loop().time() + BODY_SECONDS
    headers = dict(scope["headers"])
    declared = headers.get(b"content-length", b"0")
    largest = LARGEST_UPLOAD if scope["path"] == EDITS else LARGEST_BODY

    async def bounded() -> Message:
        nonlocal size, complete
        if complete:  # what follows is the client's leaving, which may take as long as it likes
            return await receive()
        if declared.isdigit() and int(declared) > largest:
            raise _too_large(largest)
        try:
            async with asyncio.timeout_at(end):
                message: MutableMapping[str, Any] = await receive()
        except TimeoutError as error:
            text = f"the body did not arrive in {BODY_SECONDS:g} s"
            raise FaultError(408, "body_too_slow", text, headers={"Connection": "close"}) from error
        size += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if size > largest:
            raise _too_large(largest)
        return message

    return bounded


def _too_large(largest: int) -> FaultError:
    text = f"the body is larger than {largest} bytes"
    return FaultError(413, "too_large", text, headers={"Connection": "close"})


class JsonLines(logging.Formatter):
    """A log record as one line of JSON, with what `extra` gave."""

    USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        content: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        content |= {key: value for key, value in vars(record).items() if key not in self.USUAL}
        if record.exc_info:
            content["trace"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)
