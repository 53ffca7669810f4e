"""Recipes: frozen dataclasses that say everything about a training but where it reads and writes."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from ..runtime.errors import FewstepError, first_line, require
from .autoencoder import AutoencoderConfig
from .checks import at_least
from .collapse import WatchdogConfig
from .flow_matching import FlowMatchingConfig
from .teacher import TeacherConfig
from .trainer_config import TrainerConfig

MethodConfig = TypeVar("MethodConfig")
Recipe = TypeVar("Recipe")

MOST_STEPS = 8


@dataclass(frozen=True)
class StudentRecipe(Generic[MethodConfig]):
    """How a student is made.

    Args:
        method: the method's own constants.
        trainer: budget and optimisation.
        steps: network evaluations of the student, 1 to 8.
        batch_size: samples of each phase of an iteration, on each process.
        lora_rank: train low-rank adapters of this rank on the frozen teacher (arXiv 2106.09685); 0 trains all weights.
        watchdog: thresholds of the checks against collapse.
    """

    method: MethodConfig
    trainer: TrainerConfig = field(
        default_factory=partial(TrainerConfig, minutes=40, warmup=50, decay=0.3, ema_decay=0.995, weight_decay=0.0)
    )
    steps: int = 1
    batch_size: int = 16
    lora_rank: int = 0
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise FewstepError(f"{self.steps} steps are not possible for a few-step student: give 1 to {MOST_STEPS}")
        at_least(1, batch_size=self.batch_size)
        at_least(0, lora_rank=self.lora_rank)


@dataclass(frozen=True)
class TeacherRecipe:
    """How a teacher is made.

    Args:
        network: shape of the transformer.
        method: the loss.
        trainer: budget and optimisation.
        batch_size: samples an iteration, on each process.
    """

    network: TeacherConfig = field(default_factory=TeacherConfig)
    method: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    trainer: TrainerConfig = field(default_factory=partial(TrainerConfig, minutes=60))
    batch_size: int = 32

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size)


@dataclass(frozen=True)
class AutoencoderRecipe:
    """How an autoencoder is made.

    Args:
        network: shape and loss.
        trainer: budget and optimisation.
        batch_size: pictures an iteration, on each process.
    """

    network: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    trainer: TrainerConfig = field(default_factory=partial(TrainerConfig, minutes=15, warmup=100, ema_decay=0.99))
    batch_size: int = 16

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size)


def read_recipe(path: Path, default: Recipe) -> Recipe:
    """Overlay `default` with what a YAML file says.

    Args:
        path: a mapping shaped as the recipe; what it leaves out keeps its default.
        default: a recipe.

    Raises:
        FewstepError: the file is missing or no mapping, a key is unknown, or a value has the wrong type.
    """
    yaml = require("yaml", "train")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = getattr(error, "strerror", None) or first_line(error)
        if where := getattr(error, "problem_mark", None):  # of YAML, whose first line tells half of it
            cause = f"line {where.line + 1}: {getattr(error, 'problem', '')}"
        raise FewstepError(f"cannot read the recipe {path}: {cause}") from error
    return overlay(default, content or {}, str(path))


def overlay(default: Recipe, values: Any, place: str) -> Recipe:
    """`default` with `values` in the place of its fields, nested recipes included.

    Args:
        default: a frozen dataclass.
        values: a mapping from field names.
        place: what messages call it.

    Raises:
        FewstepError: a key is unknown, or a value has the wrong type.
    """
    if not isinstance(values, dict):
        raise FewstepError(f"{place} must be a mapping from names to values, not {values!r}")
    known: Any = default
    names = {each.name for each in fields(known)}
    changes = {}
    for name, value in values.items():
        if name not in names:
            raise FewstepError(f"{place} has no field {name!r}: {_suggestion(str(name), known)}")
        old, inner = getattr(default, name), f"{place}: {name}"
        changes[name] = overlay(old, value, inner) if is_dataclass(old) else _checked(known, name, value, inner)
    return replace(known, **changes)  # type: ignore[no-any-return]


def _checked(recipe: Any, name: str, value: Any, place: str) -> Any:
    from typeguard import TypeCheckError, check_type

    value = tuple(value) if isinstance(value, list) else value
    try:
        return check_type(value, get_type_hints(type(recipe))[name])
    except TypeCheckError as error:
        raise FewstepError(f"{place}: {value!r} does not fit: {error}") from error


def _suggestion(name: str, recipe: Any) -> str:
    """The nearest field, of this recipe or of one within it."""
    own = [each.name for each in fields(recipe)]
    parts = {part: value for part in own if is_dataclass(value := getattr(recipe, part))}
    places = {each.name: f"{part}: {{{each.name}: ...}}" for part, value in parts.items() for each in fields(value)}
    places |= {name: name for name in own}
    guess = get_close_matches(name, places, n=1)
    return f"did you mean {places[guess[0]]}?" if guess else f"it has {', '.join(own)}"
