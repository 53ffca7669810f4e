"""Connections that cannot be held for ever: bounds on the head of a request, and on a client that does not read."""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
"""In which the head of a request must have arrived."""
LARGEST_HEAD = 64 * 1024
READ_SECONDS = 30.0
"""After which a client that reads nothing of its answer is given up."""
SLOW_HEAD, SLOW_READER = "the head of a request did not arrive in time", "the client does not read"

logger = logging.getLogger(__name__)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's, which bounds none of them: its clock for connections starts after their first answer only."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._clocks: dict[str, asyncio.TimerHandle] = {}
        self._head = 0
        self._wait(SLOW_HEAD, HEAD_SECONDS)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._head = 0
        self._wait(SLOW_HEAD, HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        """A head is there."""
        self._hear(SLOW_HEAD)
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Something has come."""
        super().data_received(data)
        self._head += len(data)
        if SLOW_HEAD in self._clocks and self._head > LARGEST_HEAD:
            self._give_up("the head of a request is too large")

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._wait(SLOW_READER, READ_SECONDS)

    def resume_writing(self) -> None:
        """It has read."""
        self._hear(SLOW_READER)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        for cause in list(self._clocks):
            self._hear(cause)
        super().connection_lost(exc)

    def _wait(self, cause: str, seconds: float) -> None:
        self._hear(cause)
        self._clocks[cause] = self.loop.call_later(seconds, self._give_up, cause)

    def _hear(self, cause: str) -> None:
        if clock := self._clocks.pop(cause, None):
            clock.cancel()

    def _give_up(self, cause: str) -> None:
        address: Any = self.client and self.client[0]
        logger.warning("connection closed", extra={"cause": cause, "address": address})
        self.transport.abort()
