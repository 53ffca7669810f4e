"""A process that holds one model: an engine that crashes takes nothing else with it, and has all its Python to itself.

What goes between the processes is this package's own; nothing of a request but its prompt and numbers gets there.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...runtime.errors import FewstepError, first_line

if TYPE_CHECKING:
    from ...runtime.pipeline import Pipeline

Answer = TypeVar("Answer")

START_SECONDS = 600
"""Until a model must be ready: the first start on a machine may measure every engine."""
CALL_SECONDS = 600
"""After which an engine that does not answer is taken for dead."""
CLOSE_SECONDS = 5
AT_ONCE_BYTES = 128 * 1024
"""What surely fits between two processes, so that one writes it, and the other reads it, without waiting."""


@dataclass(frozen=True)
class ModelSettings:
    """How a model is opened.

    Args:
        directory: the model's.
        engine: as for `Pipeline.from_pretrained`.
        device: as there.
        threads: of torch on a CPU; 0 for its choice.
        largest_batch: images a call.
    """

    directory: Path
    engine: str = "auto"
    device: str = "auto"
    threads: int = 0
    largest_batch: int = 8


@dataclass(frozen=True)
class Facts:
    """What a model says of itself once it is ready.

    Args:
        kind: `teacher` or `student`.
        steps: network evaluations that may be asked for; empty where any number may.
        default_steps: without a wish.
        width: of its images.
        height: of its images.
        guidance: scales that may be asked for, from and to; None where none may.
        edits: whether it can start from an image.
        engine: that draws.
        reason: why `auto` chose it.
        weights: their hash.
        evaluation_seconds: that one network evaluation of one image takes within a full batch.
    """

    kind: str
    steps: tuple[int, ...]
    default_steps: int
    width: int
    height: int
    guidance: tuple[float, float] | None
    edits: bool
    engine: str
    reason: str
    weights: str
    evaluation_seconds: float

    @property
    def size(self) -> str:
        """As OpenAI writes it."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Batch:
    """Images that are drawn together, one for each prompt and seed; of image-to-image, from as many (H, W, 3)."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int
    guidance: float | None
    negative: str
    images: Sequence[npt.NDArray[np.uint8]] = ()
    strength: float | None = None


@dataclass(frozen=True)
class Drawn:
    """Pixels (B, H, W, 3) uint8, the engine that drew them, and its seconds by stage."""

    pixels: npt.NDArray[np.uint8]
    engine: str
    stages: dict[str, float]


class EndedError(Exception):
    """The process is gone."""


class EngineError(Exception):
    """The engine failed; the process goes on."""


class RefusedError(EngineError):
    """The pipeline will not draw this, and says why in a sentence for people."""


class Worker:
    """The process of one model; a call at a time, in an event loop.

    Raises:
        FewstepError: the model does not open.
    """

    def __init__(self, settings: ModelSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, settings), daemon=True)
        try:
            self._process.start()
        except OSError as error:  # no memory, or too many processes or files
            self._connection.close()
            raise FewstepError(f"no process for {settings.directory} can be started: {error.strerror}") from error
        finally:
            theirs.close()
        try:
            if not self._connection.poll(START_SECONDS):
                self._process.kill()
            self.facts: Facts = self._receive()
        except EndedError as error:
            self.close()
            raise FewstepError(
                f"the process that opened {settings.directory} ended or took {START_SECONDS} s: is there memory enough?"
            ) from error
        except (FewstepError, EngineError) as error:
            self.close()
            raise FewstepError(str(error)) from error
        self._apart = 3 * self.facts.width * self.facts.height * settings.largest_batch > AT_ONCE_BYTES

    @property
    def process_id(self) -> int:
        """Of the process."""
        return self._process.pid or 0

    @property
    def sentinel(self) -> int:
        """A file descriptor that can be read once the process has ended."""
        return self._process.sentinel

    async def draw(self, batch: Batch, preview: Callable[[npt.NDArray[np.uint8]], None] | None = None) -> Drawn:
        """Draw a batch; `preview` is called with the pixels (H, W, 3) of a batch of one after each evaluation.

        Raises:
            EngineError: it failed.
            EndedError: its process ended.
        """
        await self._move(self._send, (batch, preview is not None))
        while isinstance(answer := await self._answer(), np.ndarray):
            if preview:
                preview(answer)
        drawn: Drawn = answer
        return drawn

    def close(self) -> None:
        """End the process, at once if it does not hear."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(CLOSE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    async def _answer(self) -> Any:
        """What the process says next. No thread waits for it: changing threads takes as long as making a PNG."""
        loop, said, descriptor = asyncio.get_running_loop(), asyncio.Event(), self._connection.fileno()
        loop.add_reader(descriptor, said.set)
        os.set_blocking(descriptor, True)  # uvloop has just made it otherwise, and an answer may come in pieces
        try:
            await self._within_time(said.wait())
        finally:
            loop.remove_reader(descriptor)
        return await self._move(self._receive)

    async def _within_time(self, moved: Awaitable[Answer]) -> Answer:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                return await moved
        except TimeoutError as error:
            self._process.kill()
            raise EndedError from error

    async def _move(self, move: Callable[..., Answer], *what: object) -> Answer:
        """Send or receive: where that may have to wait for a process that is stopped midway, in a thread."""
        return await self._within_time(asyncio.to_thread(move, *what)) if self._apart else move(*what)

    def _send(self, task: object) -> None:
        try:
            self._connection.send(task)
        except OSError as error:
            raise EndedError from error

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EndedError from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _work(connection: Connection, settings: ModelSettings) -> None:
    """Open the model, tell its facts, then draw what comes until there is nothing more."""
    for name in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all; the server ends this one in its time
        signal.signal(name, signal.SIG_IGN)
    try:
        pipeline = _open(settings)
        connection.send(_warm(pipeline, settings.largest_batch))
    except FewstepError as error:
        connection.send(error)
        return
    except Exception as error:  # of a library: the process ends, and its parent says so in one line
        connection.send(EngineError(_reason(error)))
        return
    with contextlib.suppress(EOFError, OSError):  # the server is gone
        while (task := connection.recv()) is not None:
            connection.send(_draw(pipeline, connection, *task))


def _open(settings: ModelSettings) -> "Pipeline":
    from ...runtime.engines.threads import set_threads
    from ...runtime.pipeline import Pipeline

    if settings.threads:
        set_threads(settings.threads)
    return Pipeline.from_pretrained(settings.directory, settings.engine, settings.device)


def _warm(pipeline: "Pipeline", largest_batch: int) -> Facts:
    """Draw at every step count and in every batch, so that requests find all compiled; the last batch is timed."""
    from ...runtime.pipeline import A_PROMPT

    card = pipeline.card
    result = pipeline.generate(A_PROMPT)
    for steps in card.steps[1:]:
        pipeline.generate(A_PROMPT, steps)
    for count in range(2, largest_batch + 1):
        pipeline.generate(A_PROMPT, count=count, batch_size=count)
    start = time.perf_counter()
    pipeline.generate(A_PROMPT, count=largest_batch, batch_size=largest_batch)
    seconds = time.perf_counter() - start
    _, height, width, _ = result.arrays.shape
    scales = card.guidance_range if card.kind == "student" else (1.0, 100.0)
    return Facts(
        kind=card.kind,
        steps=tuple(card.steps),
        default_steps=result.steps,
        width=width,
        height=height,
        guidance=scales and (scales[0], scales[1]),
        edits=pipeline.edits,
        engine=pipeline.engine_name,
        reason=pipeline.engine_reason,
        weights=card.weights,
        evaluation_seconds=seconds / largest_batch / result.steps,
    )


def _draw(pipeline: "Pipeline", connection: Connection, batch: Batch, previews: bool) -> Drawn | EngineError:
    def preview(pixels: npt.NDArray[np.uint8]) -> None:
        connection.send(pixels[0])

    try:
        result = pipeline.generate(
            batch.prompts,
            batch.steps,
            batch.seeds,
            guidance=batch.guidance,
            batch_size=len(batch.prompts),
            negative_prompt=batch.negative,
            preview=preview if previews else None,
            image=[Image.fromarray(pixels) for pixels in batch.images] or None,
            strength=batch.strength,
        )
    except FewstepError as error:
        return RefusedError(str(error))
    except Exception as error:  # whatever it is, the next request may fare better
        return EngineError(_reason(error))
    return Drawn(result.arrays, result.engine, result.timings)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}, in process {os.getpid()}"
