"""Wording that every message shares."""

from collections.abc import Iterable


def in_steps(steps: int) -> str:
    """``"1 step"`` or ``"4 steps"``, for a positive `steps`."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def either(names: Iterable[str]) -> str:
    """Such as `auto, torch or onnx`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
