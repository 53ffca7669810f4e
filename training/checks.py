"""Checks of a recipe's numbers; each refusal names the field as the command line does."""

import math

from ..runtime.errors import FewstepError


def at_least(least: float, **values: float) -> None:
    """Refuse a value below `least`.

    Raises:
        FewstepError: there is one.
    """
    for name, value in values.items():
        if not value >= least:
            raise FewstepError(f"{_words(name)} {value:g} is not possible: give at least {least:g}")


def above(bound: float, **values: float) -> None:
    """Refuse a value that is not above `bound`.

    Raises:
        FewstepError: there is one.
    """
    for name, value in values.items():
        if not value > bound:
            raise FewstepError(f"{_words(name)} {value:g} is not possible: give more than {bound:g}")


def within(low: float, high: float, **values: float) -> None:
    """Refuse a value outside [`low`, `high`].

    Raises:
        FewstepError: there is one.
    """
    for name, value in values.items():
        if not low <= value <= high:
            raise FewstepError(f"{_words(name)} {value:g} is not possible: give {low:g} to {high:g}")


def below_one(**values: float) -> None:
    """Refuse a value outside [0, 1).

    Raises:
        FewstepError: there is one.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise FewstepError(f"{_words(name)} {value:g} is not possible: give at least 0 and less than 1")


def rising(low: float = -math.inf, high: float = math.inf, **ranges: tuple[float, float]) -> None:
    """Refuse a range whose ends do not rise, or that leaves [`low`, `high`].

    Raises:
        FewstepError: there is one.
    """
    for name, (first, last) in ranges.items():
        if not low <= first < last <= high:
            inside = "" if math.isinf(low) else f" within {low:g} and {high:g}"
            raise FewstepError(f"{_words(name)} {first:g} to {last:g} is not possible: give two rising numbers{inside}")


def _words(name: str) -> str:
    return name.replace("_", " ").replace("lora", "LoRA")
