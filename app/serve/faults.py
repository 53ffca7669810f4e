"""Refusals as OpenAI's API words them: `{"error": {"message", "type", "param", "code"}}`, one clear sentence each."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from .metrics import Metrics

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class FaultError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        code: for programs; also the cause that metrics count.
        message: for people.
        parameter: the field at fault.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        parameter: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.parameter, self.headers = parameter, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is answered."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}}


SERVER_FAILED = FaultError(500, "server_error", "the server failed on this request; its log says more")
"""For what should never happen."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`."""
    texts = {
        400: "The request cannot be served as it is.",
        401: "The API key is missing or unknown.",
        403: "A script of another page asks, which the operator has not allowed.",
        404: "No such model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "Too many images are waiting; `Retry-After` says when to come back.",
        500: "The engine failed.",
        503: "No engine was free in time, or the server is about to stop.",
    }
    return {status: {"model": ErrorBody, "description": texts[status]} for status in statuses}


def answer(fault: FaultError) -> JSONResponse:
    """A fault as a response."""
    return JSONResponse(fault.body(), fault.status, fault.headers)


def refusal(fault: FaultError, metrics: Metrics) -> JSONResponse:
    """The same, counted."""
    metrics.rejections.labels(fault.code).inc()
    return answer(fault)


def invalid_request(errors: Sequence[Any], prefix: Sequence[str] = ()) -> FaultError:
    """What pydantic found, as a fault: of several readings of a field, the one of the right type that got furthest."""
    worst = max(errors, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"])))
    if worst["type"] == "json_invalid":
        return FaultError(400, "invalid_json", f"the body is no JSON: {worst['ctx']['error']}")
    places = [str(place) for place in worst["loc"][len(prefix) :]]
    field = ".".join(place for place in places if place.isidentifier() or place.isdigit())
    message = str(worst["msg"])
    return FaultError(400, "invalid_request", f"{field}: {message}" if field else message, field or None)


def install(app: FastAPI, metrics: Metrics) -> None:
    """Have an application answer all faults in this way, and count them."""

    @app.exception_handler(FaultError)
    async def refused(_: Request, fault: FaultError) -> JSONResponse:
        return refusal(fault, metrics)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return refusal(invalid_request(error.errors(), prefix=("body",)), metrics)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, FaultError):  # of reading the body
            return refusal(error.__cause__, metrics)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        return refusal(FaultError(error.status_code, code, str(error.detail), headers=error.headers), metrics)
