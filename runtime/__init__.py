"""Runtime: schedules, denoisers, samplers, engines and the `Pipeline` that generates."""

if __name__ == "runtime":
    raise ImportError("import fewstep.runtime, not the bare folder runtime: run python with -P, or elsewhere")

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Pipeline, Result

__all__ = ["Pipeline", "Result"]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and torch with it, only when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import pipeline

    return getattr(pipeline, name)
