"""What `fewstep serve --ray FILE` serves: the file, and the same content as the `args` of a Ray Serve application."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...runtime.errors import FewstepError, require
from .keys import is_loopback
from .service import Limits
from .worker import ModelSettings


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelPart(_Part):
    """One model; `path` lies on every machine of the cluster."""

    path: str
    engine: str = "auto"
    device: str = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    largest_batch: Annotated[int, Field(ge=1, le=64)] = 8

    @property
    def settings(self) -> ModelSettings:
        """As a worker takes them."""
        return ModelSettings(Path(self.path), self.engine, self.device, self.threads, self.largest_batch)


class ReplicaPart(_Part):
    """The replicas that draw: how many, what each takes of its machine, and when there are to be more or fewer.

    Args:
        least: that there always are.
        most: that there ever are.
        models: open at once in one replica; None for all.
        cpus: cores that Ray reserves for one.
        gpus: the same, and all that it sees.
        requests: being drawn or waiting in each, on average, that the number of replicas is steered to.
        grow_seconds: that there must have been more before another replica starts.
        shrink_seconds: that there must have been fewer before one ends.
    """

    least: Annotated[int, Field(ge=1)] = 1
    most: Annotated[int, Field(ge=1)] = 1
    models: Annotated[int | None, Field(ge=1)] = None
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    requests: Annotated[float, Field(gt=0)] = 8.0
    grow_seconds: Annotated[float, Field(ge=0)] = 10.0
    shrink_seconds: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _ordered(self) -> "ReplicaPart":
        if self.most < self.least:
            raise ValueError(f"most is {self.most}, but least is {self.least}: most is at least as many")
        return self


class FrontPart(_Part):
    """The replicas that speak HTTP: they check, queue, encode, and draw nothing."""

    count: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(ge=0)] = 0.1


class RaySettings(_Part):
    """The whole file; what is not explained is as of `fewstep serve`.

    Args:
        models: by name; the first is what a request without a name gets.
        host: address to listen on; beyond this machine it takes keys.
        port: of every machine that a front runs on.
        wait: seconds that a request may wait for an engine.
        linger: milliseconds that a free engine waits for a batch to fill.
        keys: file that `fewstep key` made.
        origins: of pages that may ask.
        checker: MODULE:FUNCTION that says which pictures not to show.
        replicas: that draw.
        fronts: that speak HTTP.
    """

    models: Annotated[dict[str, ModelPart], Field(min_length=1)]
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    wait: Annotated[float, Field(ge=0.01)] = 5.0
    linger: Annotated[float, Field(ge=0)] = 0.0
    keys: str | None = None
    origins: list[str] = []
    checker: str = ""
    replicas: ReplicaPart = ReplicaPart()
    fronts: FrontPart = FrontPart()

    @model_validator(mode="after")
    def _closed(self) -> "RaySettings":
        if not self.keys and not is_loopback(self.host):
            raise ValueError(f"{self.host} is reached from other machines: make keys with `fewstep key`, and name them")
        return self

    @property
    def all_fit(self) -> bool:
        """Whether every replica has every model open."""
        return (self.replicas.models or len(self.models)) >= len(self.models)

    @property
    def busy(self) -> int:
        """Requests at which a replica has enough to do: two batches of its largest."""
        return 2 * max(model.largest_batch for model in self.models.values())

    @property
    def limits(self) -> Limits:
        """Of every queue."""
        return Limits(wait_seconds=self.wait, linger_seconds=self.linger / 1000)


def read_settings(file: Path) -> RaySettings:
    """Read a TOML or YAML file; the paths in it are relative to its folder.

    Raises:
        FewstepError: it cannot be read, or says what cannot be.
    """
    return parse_settings(_content(file), str(file), file.resolve().parent)


def parse_settings(content: Any, source: str, folder: Path) -> RaySettings:
    """Check the content of such a file.

    Raises:
        FewstepError: it says what cannot be.
    """
    try:
        settings = RaySettings.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise FewstepError(f"{source}: {place}: {message}" if place else f"{source}: {message}") from error
    models = {
        name: model.model_copy(update={"path": str(folder / model.path)}) for name, model in settings.models.items()
    }
    keys = settings.keys and str(folder / settings.keys)
    return settings.model_copy(update={"models": models, "keys": keys})


def _content(file: Path) -> Mapping[str, Any]:
    if file.suffix not in (".toml", ".yaml", ".yml"):
        raise FewstepError(f"{file} is neither TOML nor YAML: name it with .toml, .yaml or .yml")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise FewstepError(f"cannot read {file}: {error.strerror}") from error
    if file.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise FewstepError(f"{file} is not valid TOML: {error}") from error
    yaml = require("yaml", "ray")
    try:
        found: Mapping[str, Any] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise FewstepError(f"{file} is not valid YAML{place}") from error
    return found
