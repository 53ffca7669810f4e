"""Numbers that no method can work with are refused when a recipe is read, by the name they have there."""

import math
from typing import Any

import pytest

from fewstep.runtime.errors import FewstepError
from fewstep.training.flow_matching import FlowMatchingConfig
from fewstep.training.methods import METHODS, get_method
from fewstep.training.pairs import PairsConfig

POSITIVE, COUNT, WEIGHT, DECAY = (0.0, -1e-4, math.nan), (0, -1), (-0.1, math.nan), (-0.1, 1.0, math.nan)
TIMES = ((0.5, 0.5), (0.9, 0.1), (-0.1, 0.5), (0.5, 1.1))
GUIDANCES = ((5.0, 3.0), (-1.0, 3.0))

CONSISTENCY = {"target_decay": DECAY, "huber_width": POSITIVE, "learning_rate": POSITIVE}
LCM = CONSISTENCY | {"solver_steps": COUNT, "guidance_range": GUIDANCES}
IMPOSSIBLE: dict[str, dict[str, tuple[Any, ...]]] = {
    "consistency": CONSISTENCY | {"points": COUNT},
    "lcm": LCM,
    "scott": LCM
    | {
        "substeps": COUNT,
        "eta": WEIGHT,
        "generator_weight": WEIGHT,
        "time_range": TIMES,
        "discriminator_learning_rate": POSITIVE,
    },
    "dmd2": {
        "student_every": COUNT,
        "student_learning_rate": POSITIVE,
        "fake_learning_rate": POSITIVE,
        "generator_weight": WEIGHT,
        "discriminator_weight": WEIGHT,
        "time_range": TIMES,
        "warm_up_share": DECAY,
    },
    "progressive": {"teacher_steps": (1, 0, -8), "learning_rate": POSITIVE},
    "rectified-flow": {"rounds": (-1,), "learning_rate": POSITIVE},
    "rectified-flow-plus": {"learning_rate": POSITIVE, "concentration": POSITIVE, "perceptual_weight": WEIGHT},
}
OTHERS: list[tuple[Any, dict[str, tuple[Any, ...]]]] = [
    (PairsConfig, {"count": COUNT, "solver_steps": COUNT}),
    (FlowMatchingConfig, {"learning_rate": POSITIVE, "time_deviation": POSITIVE, "dropout": (-0.1, 1.1)}),
]
CONFIGS = [(get_method(name).Config, fields) for name, fields in IMPOSSIBLE.items()] + OTHERS


def test_every_method_is_covered() -> None:
    assert IMPOSSIBLE.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [(config, field, value) for config, fields in CONFIGS for field, values in fields.items() for value in values],
)
def test_impossible_numbers_are_refused_by_name(config: Any, field: str, value: Any) -> None:
    with pytest.raises(FewstepError, match=f"^{field.replace('_', ' ')} .* is not possible: give "):
        config(**{field: value})
