"""Wording that every message shares."""


def in_steps(steps: int) -> str:
    """``"1 step"`` or ``"4 steps"``, for a positive `steps`."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"
