"""The page on the server's application, which keeps its routes; nothing of it comes from elsewhere, or goes there."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import gradio
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...runtime.artefact import Card
from ..serve.faults import FaultError, answer
from .page import CSS, HEAD, ICON, build_page, theme
from .rivals import Rivals
from .scenes import Scenes

PATH = "/demo"
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
"""Of the browser, for all that the page loads: Gradio's code has inline scripts, and its templates are compiled."""


def mount(app: FastAPI, cards: Mapping[str, Card], benchmark: Path) -> None:
    """Add the page to an application of `create_app`, at `PATH`, where `/` leads.

    Args:
        app: its models need not be open yet.
        cards: of its models, by the names it serves them under.
        benchmark: JSON file of `fewstep bench`; it may be missing.
    """
    students = {name: tuple(card.steps) for name, card in cards.items() if card.kind == "student"}
    teacher = next((name for name, card in cards.items() if card.kind == "teacher"), None)
    rivals = Rivals(app.state.context, app.state.settings.models)
    page = build_page(Scenes(app.state.context, students, teacher, rivals), benchmark)
    served = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(application: FastAPI) -> AsyncIterator[None]:
        async with served(application):
            try:
                yield
            finally:
                await rivals.close()

    app.router.lifespan_context = lifespan
    app.add_route("/", lambda _: RedirectResponse(f"{PATH}/"), include_in_schema=False)
    app.add_route("/favicon.ico", lambda _: Response(ICON, media_type="image/svg+xml"), include_in_schema=False)
    app.add_route(f"{PATH}/gradio_api/upload", _no_upload, methods=["POST"], include_in_schema=False)
    gradio.mount_gradio_app(
        app, page, PATH, theme=theme(), css=CSS, head=HEAD, footer_links=[], run_history=False, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, show_error=True, max_file_size="1kb",
    )  # fmt: skip
    app.add_middleware(_Closed)


async def _no_upload(_: Request) -> Response:
    """Gradio would write whatever is sent to the disk; this page sends nothing."""
    return answer(FaultError(404, "not_found", "nothing can be uploaded here"))


class _Closed:
    """Tells browsers `POLICY`, on every answer of the page."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)
