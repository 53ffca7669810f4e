"""Every operation at the shapes of `shapes.FULL`, the most telling shapes first."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest

from .matrix_cases import attention_cases, embedding_cases, quantised_cases, tangent_cases
from .measure import Case
from .memory_cases import (
    gate_cases,
    group_norm_cases,
    matching_cases,
    modulation_cases,
    noise_cases,
    norm_cases,
    residual_cases,
    rotary_cases,
    step_cases,
)
from .shapes import FULL, Shapes

OPERATIONS: tuple[Callable[[Shapes], Iterable[Case]], ...] = (
    group_norm_cases,
    modulation_cases,
    residual_cases,
    rotary_cases,
    gate_cases,
    attention_cases,
    tangent_cases,
    quantised_cases,
    step_cases,
    matching_cases,
    norm_cases,
    embedding_cases,
    noise_cases,
)


def all_cases(shapes: Shapes = FULL) -> Iterator[Case]:
    """The first case of every operation, then the second of each, and so on: what comes last may fall off."""
    in_turn = zip_longest(*(cases(shapes) for cases in OPERATIONS))
    return (case for case in chain.from_iterable(in_turn) if case is not None)
