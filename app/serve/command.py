"""`fewstep serve` and `fewstep key`."""

import asyncio
import importlib
import logging
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ...runtime.errors import FewstepError, require
from ..models import SHIPPED_STUDENT

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

    from .context import Checker

DRAIN_SECONDS = 60
"""After SIGTERM, for what waits and is being drawn."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""
LARGEST_MESSAGE = 65536
"""Of a WebSocket, in bytes."""
MOST_FILES, OWN_FILES = 65536, 256
"""Descriptors that a server makes use of, and those of them that are not for connections."""
THREADS = 64
"""For what would hold up the event loop: models that open, large pictures, a checker. asyncio would have six on two
cores, and every model that opens takes one."""


def serve(
    models: Annotated[
        list[str] | None, typer.Argument(help="Model directories, or NAME=DIR.", show_default="the shipped student")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine it takes --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    engine: Annotated[str, typer.Option(help="auto, torch, or one that was exported.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of a process; 0: the engine's choice.")] = 0,
    replicas: Annotated[int, typer.Option(min=1, help="Processes for each model.")] = 1,
    largest_batch: Annotated[int, typer.Option(min=1, max=64, help="Images that are drawn together.")] = 8,
    linger: Annotated[
        float, typer.Option(min=0, help="Milliseconds that a free engine waits for a batch to fill.")
    ] = 0,
    wait: Annotated[float, typer.Option(min=0.01, help="Seconds that a request may wait for an engine.")] = 5,
    keys: Annotated[Path | None, typer.Option(help="File of API keys that `fewstep key` made.")] = None,
    origin: Annotated[list[str] | None, typer.Option(help="Origin of a page that may ask; repeat for more.")] = None,
    checker: Annotated[str, typer.Option(help="MODULE:FUNCTION that says which pictures not to show.")] = "",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Have the log tell what is drawn.")] = False,
    ray: Annotated[
        Path | None, typer.Option(help="On a Ray cluster, as this TOML or YAML file says, instead of all else here.")
    ] = None,
) -> None:
    """Serve models over HTTP, as OpenAI's image API; SIGHUP loads them anew, SIGTERM finishes what waits and ends."""
    if ray:
        from .ray_application import serve_on_ray

        serve_on_ray(ray)
        return
    require_server()
    from .keys import Keys, is_loopback
    from .server import LOOPBACK_NAMES, ServerSettings, create_app
    from .service import Limits
    from .worker import ModelSettings

    if not keys and not is_loopback(host):
        raise FewstepError(f"{host} is reached from other machines: make keys with `fewstep key`, and give --keys FILE")
    open_with = partial(ModelSettings, engine=engine, device=device, threads=threads, largest_batch=largest_batch)
    settings = ServerSettings(
        models={name: open_with(path) for name, path in named(models or [str(SHIPPED_STUDENT)]).items()},
        replicas=replicas,
        limits=Limits(wait_seconds=wait, linger_seconds=linger / 1000),
        keys=Keys.read(keys) if keys else Keys(),
        origins=origin or (),
        hosts=(*LOOPBACK_NAMES, host) if is_loopback(host) and not keys else (),
        checker=find_checker(checker) if checker else None,
        log_prompts=log_prompts,
    )
    log_lines()
    run(create_app(settings), host, port)


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: Annotated[Path, typer.Option(help="File of hashes to add it to.")] = Path("keys.txt"),
) -> None:
    """Make an API key: it is printed once, and the file keeps only its hash."""
    from .keys import new_key

    typer.echo(new_key(name, file))


def require_server() -> None:
    """Raise `FewstepError` if a library of the server is missing."""
    for library in ("fastapi", "uvicorn", "prometheus_client"):
        require(library, "serve")


def named(models: list[str]) -> dict[str, Path]:
    """Directories by the names that requests call them by.

    Raises:
        FewstepError: two have one name.
    """
    found: dict[str, Path] = {}
    for text in models:
        name, given, path = text.rpartition("=")
        name = name if given else Path(path).resolve().name
        if name in found:
            raise FewstepError(f"two models are called {name}: give one of them as NAME=DIR")
        found[name] = Path(path)
    return found


def find_checker(place: str) -> "Checker":
    """A checker by its place, `MODULE:FUNCTION`.

    Raises:
        FewstepError: there is none.
    """
    module, _, name = place.partition(":")
    try:
        found: Checker = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise FewstepError(
            f"there is no checker {place}: give --checker MODULE:FUNCTION that can be imported"
        ) from error
    return found


def log_lines() -> None:
    """Have this process log to its standard error, in lines of JSON."""
    from .access import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


def run(app: "FastAPI", host: str, port: int) -> None:
    """Serve until a signal ends it.

    Raises:
        FewstepError: a model does not open, or the address is taken.
    """
    with listen(host, port) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(app, listener))


def _loop_factory() -> "Callable[[], asyncio.AbstractEventLoop] | None":
    """Of uvloop, which takes half a millisecond less a request; it is not made for Windows."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def listen(host: str, port: int, advice: str = "give another --port") -> socket.socket:
    """A socket that listens; `FewstepError` with an advice if the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named: asyncio turns Nagle's algorithm off, which costs 40 ms a request, for such sockets only.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
        return listener
    except OSError as error:
        listener.close()
        raise FewstepError(f"cannot listen on {host}:{port} ({error.strerror}): {advice}") from error


def _protocol() -> "type[asyncio.Protocol] | Literal['auto']":
    try:
        from .protocol import BoundedProtocol
    except ImportError:  # httptools, like uvloop, is not there on every system; uvicorn has another
        return "auto"
    return BoundedProtocol


def _connections() -> int:
    """How many there may be, after this process has been allowed the most files it may have."""
    try:
        import resource
    except ImportError:  # Windows
        return MOST_FILES - OWN_FILES
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, files), most))
    return max(files - OWN_FILES, files // 2)


async def _serve(app: "FastAPI", listener: socket.socket) -> None:
    import uvicorn

    from .server import open_models, reload

    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    loop.set_default_executor(ThreadPoolExecutor(THREADS))
    await open_models(app)

    def hang_up() -> None:
        task = asyncio.create_task(reload(app))
        tasks.add(task)  # the loop itself would forget it
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, hang_up)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"fewstep serves {', '.join(app.state.context.services)} on http://{shown}:{port}")
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        ws_max_size=LARGEST_MESSAGE,
        # Whoever is behind a proxy says so by keys or `user`: a header that anybody can write gives nobody a turn.
        proxy_headers=False,
        http=_protocol(),
        limit_concurrency=_connections(),
    )
    await uvicorn.Server(config).serve([listener])
