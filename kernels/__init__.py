"""Kernels: fused GPU operations, each with its torch reference; `apply` puts them into a network of diffusers."""

from typing import TYPE_CHECKING, Any

if __name__ == "kernels":
    raise ImportError(
        "import fewstep.kernels, not the bare folder kernels: run python with -P, or from another directory"
    )

if TYPE_CHECKING:
    from .patch import apply, remove

__all__ = ["apply", "remove"]


def __getattr__(name: str) -> Any:
    """Import torch only for those who patch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import patch

    return getattr(patch, name)
