"""Who may ask, told before a body is read: whoever has no key, or is another page's script, sends none."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from .context import Context
from .faults import FaultError, refusal

KEYED = "/v1/"
"""What keys are for."""
HARMLESS = ("GET", "HEAD", "OPTIONS")


class Door:
    """A layer around the routes, within that of CORS, so that a page that is allowed to ask can read why it is refused.

    `request.user` is then the `User` who asks.

    Args:
        app: what it is around.
        context: the application's.
    """

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self.app, self.context = app, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            try:
                self._admit(HTTPConnection(scope), scope["method"])
            except FaultError as fault:
                fault.headers["Connection"] = "close"
                await refusal(fault, self.context.metrics)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _admit(self, connection: HTTPConnection, method: str) -> None:
        if method not in HARMLESS:
            require_same_origin(connection.headers, self.context.origins)
        if connection.scope["path"].startswith(KEYED):
            connection.scope["user"] = self.context.user(connection)


def require_same_origin(headers: Headers, origins: Sequence[str]) -> None:
    """Refuse a page that neither comes from here nor from an origin that the operator allowed.

    Browsers let any page open a WebSocket to any server, and send it forms, this machine's own included.

    Raises:
        FaultError: the request is of such a page.
    """
    origin = headers.get("origin")
    if origin is None or origin in origins:
        return
    try:
        host = urlsplit(origin).netloc
    except ValueError:
        host = ""
    if not host or host != headers.get("host"):
        raise FaultError(403, "other_origin", "this page is not allowed to ask here: the server's operator can let it")
