"""The server as an application of Ray Serve: for `fewstep serve --ray FILE` here, for `serve deploy` on a cluster."""

import contextlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...runtime.artefact import read_card
from ...runtime.errors import FewstepError, require
from .command import find_checker, listen
from .keys import Keys
from .ray_front import Front
from .ray_models import Models
from .ray_settings import RaySettings, parse_settings, read_settings

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "fewstep"
DRAIN_SECONDS = 60.0
"""That a replica has for what it is doing when it is to end."""
LOOK_SECONDS = 2.0
"""Between two looks whether it is done."""
CONNECTIONS = 4096
"""Requests that one front holds open."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Of shared memory that is set aside: pictures larger than 100 kB pass through it, one after another."""

QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Of Ray itself: the application logs its requests."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # Ray's own ports take orders, which are programs, from whoever has the token
    "RAY_worker_niceness": "0",  # not 15: those who draw are not in the background
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Ray's 5 s are too few to start on a machine that is busy
}


def application(args: dict[str, Any]) -> "Application":
    """Build it from what such a file holds; the `import_path` of a Ray Serve config, the rest being its `args`.

    Raises:
        FewstepError: they say what cannot be.
    """
    return build(parse_settings(args, "args", Path("/")))


def build(settings: RaySettings) -> "Application":
    """Two deployments: fronts that speak HTTP, replicas that draw.

    Raises:
        FewstepError: keys or checker cannot be read.
    """
    serve: Any = require("ray.serve", "ray")
    keys = Keys.read(Path(settings.keys)) if settings.keys else Keys()
    checker = find_checker(settings.checker) if settings.checker else None
    names, replicas = list(settings.models), settings.replicas
    both = {
        "graceful_shutdown_timeout_s": DRAIN_SECONDS,
        "graceful_shutdown_wait_loop_s": LOOK_SECONDS,
        "logging_config": QUIET,
    }
    bounded = serve.multiplexed(max_num_models_per_replica=replicas.models or len(names))
    models = serve.deployment(type("Models", (Models,), {"open": bounded(Models.open)})).options(
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        # Where not every replica has every model, one that is busy must let others open the model that is asked for.
        max_ongoing_requests=settings.limits.images if settings.all_fit else settings.busy,
        max_queued_requests=settings.limits.images,
        autoscaling_config={
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": replicas.requests,
            "upscale_delay_s": replicas.grow_seconds,
            "downscale_delay_s": replicas.shrink_seconds,
        },
        user_config={"models": names} if settings.all_fit else None,
        **both,
    )
    fronts = serve.deployment(serve.ingress()(Front)).options(
        ray_actor_options={"num_cpus": settings.fronts.cpus},
        num_replicas=settings.fronts.count,
        max_ongoing_requests=CONNECTIONS,
        user_config={"models": names},
        **both,
    )
    found: Application = fronts.bind(settings, keys, checker, models.bind(settings))
    return found


def serve_on_ray(file: Path) -> None:
    """Serve as a file says until a signal ends it, on the cluster that RAY_ADDRESS names or else on this machine alone.

    Raises:
        FewstepError: the file says what cannot be, or a model does not open.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    settings = read_settings(file)
    for model in settings.models.values():
        read_card(Path(model.path))
    ray: Any = require("ray", "ray")
    serve: Any = require("ray.serve", "ray")
    deployed, ended = build(settings), threading.Event()
    _join(ray, settings)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray's own end the process at once
            signal.signal(number, lambda *_: ended.set())
        serve.start(http_options={"host": settings.host, "port": settings.port}, logging_config=QUIET)
        try:
            serve.run(deployed, name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise FewstepError(f"the application does not start: {_cause(serve.status())}") from error
        typer.echo(f"fewstep serves {', '.join(settings.models)} on http://{settings.host}:{settings.port}")
        ended.wait()
        serve.delete(NAME)  # waits for what is being drawn; a shutdown alone would hang up on its clients
        serve.shutdown()
    except TimeoutError as error:
        raise FewstepError(f"Ray does not start: {error}") from error
    finally:
        ray.shutdown()


def _join(ray: Any, settings: RaySettings) -> None:
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address, logging_level=logging.WARNING)
        return
    # Ray would share a port with another server that lets it: each gets some of the requests.
    listen(settings.host, settings.port, "give another port in the file").close()
    # Ray has its processes import from the folder that it is started in: files there would pass for packages.
    with contextlib.chdir(sys.prefix):
        ray.init(
            "local", logging_level=logging.WARNING, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES
        )


def _cause(status: Any) -> str:
    """The sentence that says why a replica did not start, out of the traces that Ray gives."""
    messages = [deployment.message for deployment in status.applications[NAME].deployments.values()]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    ours = [line.partition("FewstepError: ")[2] for line in lines if "FewstepError: " in line]
    return next(iter(ours or lines), "Ray's log says why")
