"""What the trainer asks of whoever watches over it."""

from collections.abc import Mapping
from typing import Any, Protocol


class Watch(Protocol):
    """Looks on and says when training has collapsed; all networks are whole meanwhile."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether training has collapsed, at a point of the curve."""
        ...

    def reset(self, step: int) -> None:
        """Begin, or begin anew after a rollback, with the weights of `step`."""
        ...

    def sound(self) -> bool:
        """Whether the student shows no sign of collapse as it is now, so that it is worth going back to."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, ready for JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, in the place of `reset`."""
        ...
