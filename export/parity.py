"""Parity: what an engine computes against torch in float32, from the same prompts and seeds, part by part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.engines import PIXELS, TEXT_ENCODER, TRAJECTORY, Arrays, Engines
from ..runtime.errors import first_line
from ..runtime.noise import trajectory_noise
from ..runtime.text import CONDITION, Tokenizer
from .differences import (
    END_TO_END,
    TOLERANCES,
    Measures,
    beyond,
    image_measures,
    pixel_measures,
    tensor_measures,
    worst,
)

PROMPTS = ("a red apple", "smiling face with sunglasses", "house and garden on a rainy night, seen from far away", "x")
BATCHES = (1, 3, 8)
"""Batches of one, and of sizes that do and do not fill vector registers."""
BATCHES_OF_LARGE = (1, 3)
"""Of networks beyond 2 GiB: eight images of theirs take as much memory again as model and engine together."""
LARGEST_DROP = 0.02
"""Of a share such as match@1. Where one picture in twenty changes sides, 500 pictures scatter by 0.01: twice that."""

Score = Callable[[Engines], float]
"""How well engines draw, as a share of their pictures (match@1, say); the same prompts and seeds at every call."""

Measure = Callable[[Any, Any], list[Measures]]
_MEASURE: Mapping[str, Measure] = {TRAJECTORY: pixel_measures, END_TO_END: image_measures}


@dataclass(frozen=True)
class Trial:
    """One batch, by torch and by the engine.

    Args:
        prompts: B of them.
        seeds: of their noise.
        inputs: of each part.
        expected: what torch makes of them: one array, such as states (B, L, D) or pixels (B, H, W, 3), or several.
        found: what the engine makes of them; a part that cannot run is missing.
        errors: why it cannot.
        setting: how the images were made, where there is more than one way.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    inputs: Mapping[str, Arrays]
    expected: Mapping[str, Any]
    found: Mapping[str, Any]
    errors: Mapping[str, str]
    setting: str = ""

    def measures(self, part: str) -> list[Measures]:
        """Distances of each image; none if the part could not run."""
        if part not in self.found:
            return []
        found, expected = self.found[part], self.expected[part]
        if isinstance(expected, dict):
            each = [tensor_measures(found[name], expected[name]) for name in expected]
            return [worst(measures) for measures in zip(*each, strict=True)]
        measure: Measure = _MEASURE.get(part, tensor_measures)
        return measure(found, expected)


@dataclass(frozen=True)
class Quality:
    """Scores of the same prompts and seeds.

    Args:
        torch: of the student in float32.
        engine: of the engine.
        largest_drop: from one to the other.
    """

    torch: float
    engine: float
    largest_drop: float


@dataclass(frozen=True)
class Failure:
    """Why an engine is refused.

    Args:
        part: the first that departs, `quality`, or `build` of what cannot be built or opened.
        reason: what is wrong with it, as a clause.
        case: prompt, seed and batch size of the first image that shows it; empty if it is no single image.
        place: the first value in the graph that departs, its operator and its module; empty if no single one does.
    """

    part: str
    reason: str
    case: str = ""
    place: str = ""


@dataclass(frozen=True)
class ParityReport:
    """What `parity.json` holds.

    Args:
        target: name of the engine.
        precision: of its arithmetic.
        images: how many were compared.
        worst: the worst of each measure over them, by part.
        tolerance: what each may be.
        quality: the scores, if they were asked for.
        failure: why it is refused, if it is.
    """

    target: str
    precision: str
    images: int
    worst: Mapping[str, Measures]
    tolerance: Mapping[str, Measures]
    quality: Quality | None = None
    failure: Failure | None = None


def check_parity(
    reference: Engines, engines: Engines, tokenize: Tokenizer, precision: str, score: Score | None = None
) -> tuple[ParityReport, Trial]:
    """Compare each part, and both in turn, over several prompts, seeds and batch sizes.

    Args:
        reference: torch, in float32.
        engines: the exported graphs.
        tokenize: makes prompts into the text encoders' inputs.
        precision: a key of `TOLERANCES`.
        score: if given, must not fall by more than `LARGEST_DROP` either.

    Returns:
        The report, and the batch that shows the failure or, if there is none, the largest.
    """
    trials = [_trial(reference, engines, tokenize, seeds) for seeds in seeds_of_batches()]
    report, trial = judge(engines.name, precision, TOLERANCES[precision], trials)
    if score and not report.failure:
        report = with_quality(report, *map(score, (reference, engines)))
    return report, trial


def seeds_of_batches(batches: Sequence[int] = BATCHES) -> list[range]:
    """The seeds of every batch that is compared."""
    return [range(end - batch, end) for batch, end in zip(batches, accumulate(batches), strict=True)]


def prompts_of(seeds: Sequence[int]) -> list[str]:
    """Of a batch that is compared, one for each seed: `PROMPTS` in turn."""
    return list(islice(cycle(PROMPTS), len(seeds)))


def judge(
    target: str, precision: str, tolerance: Mapping[str, Measures], trials: Sequence[Trial]
) -> tuple[ParityReport, Trial]:
    """What trials say of an engine, and the one that shows the failure or, if there is none, the last.

    Args:
        target: name of the engine.
        precision: of its arithmetic.
        tolerance: what each measure may be, by part, in the order in which the parts run.
        trials: each with all those parts.
    """
    measured = {part: [trial.measures(part) for trial in trials] for part in tolerance}
    report = ParityReport(
        target=target,
        precision=precision,
        images=sum(len(trial.seeds) for trial in trials),
        worst={part: worst(list(chain(*batches))) for part, batches in measured.items() if any(batches)},
        tolerance=tolerance,
    )
    for part, batches in measured.items():
        for trial, measures in zip(trials, batches, strict=True):
            failure = _failure(trial, part, measures, tolerance)
            if failure:
                return replace(report, failure=failure), trial
    return report, trials[-1]


def make_inputs(
    tokenize: Tokenizer, engines: Engines, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[Arrays, npt.NDArray[np.float32]]:
    """Token ids of the prompts and noise of the seeds (B, draws, C, h, w)."""
    tokens = {name: value.numpy() for name, value in tokenize(prompts).items()}
    return tokens, trajectory_noise(seeds, engines.draws, engines.sample_shape)


def _trial(reference: Engines, engines: Engines, tokenize: Tokenizer, seeds: Sequence[int]) -> Trial:
    prompts = prompts_of(seeds)
    tokens, noise = make_inputs(tokenize, reference, prompts, seeds)
    condition = reference.condition(tokens)
    inputs = {TEXT_ENCODER: tokens, TRAJECTORY: {"noise": noise, **condition}, END_TO_END: {**tokens, "noise": noise}}
    pixels = _pixels(reference, inputs[TRAJECTORY])
    expected = {TEXT_ENCODER: condition[CONDITION[0]], TRAJECTORY: pixels, END_TO_END: pixels}
    run: Mapping[str, Callable[[], npt.NDArray[Any]]] = {
        TEXT_ENCODER: lambda: engines.condition(tokens)[CONDITION[0]],
        TRAJECTORY: lambda: _pixels(engines, inputs[TRAJECTORY]),
        END_TO_END: lambda: engines(tokens, noise),
    }
    return Trial(prompts, seeds, inputs, expected, *attempt(run, expected))


def attempt(run: Mapping[str, Callable[[], Any]], expected: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each part gives, and why others cannot run or give something else than torch."""
    found, errors = {}, {}
    for part, compute in run.items():
        try:
            result = compute()
        except Exception as error:  # each library raises errors of its own
            errors[part] = first_line(error)
            continue
        given, wanted = _shapes(result), _shapes(expected[part])
        if given == wanted:
            found[part] = result
        else:
            errors[part] = f"it gives {given} where torch gives {wanted}"
    return found, errors


def _shapes(result: Any) -> Any:
    """Of an array, or of each of several."""
    return {name: array.shape for name, array in result.items()} if isinstance(result, dict) else result.shape


def _pixels(engines: Engines, inputs: Arrays) -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = engines.trajectory(**inputs)[PIXELS]
    return pixels


def _failure(
    trial: Trial, part: str, measures: Sequence[Measures], tolerance: Mapping[str, Measures]
) -> Failure | None:
    """How the first image of a batch that differs too much does so; None if none does."""
    batch = f"a batch of {len(trial.seeds)}" + (f", {trial.setting}" if trial.setting else "")
    name = f"its {part.replace('_', ' ')}"
    if part == END_TO_END:
        name = f"its {' and '.join(other.replace('_', ' ') for other in tolerance if other != part)} in turn"
    if part in trial.errors:
        return Failure(part, f"{name} cannot run: {trial.errors[part]}", batch)
    for row, measured in enumerate(measures):
        excess = beyond(measured, tolerance[part])
        if excess:
            image = row % len(trial.seeds)  # guidance calls a network for each image twice
            case = f"{trial.prompts[image]!r} with seed {trial.seeds[image]} in {batch}"
            return Failure(part, f"{name}: {excess}", case)
    return None


def with_quality(report: ParityReport, torch: float, engine: float) -> ParityReport:
    """A report with scores, refused if they fall too far."""
    quality = Quality(torch, engine, LARGEST_DROP)
    if torch - engine <= LARGEST_DROP:  # NaN is not
        return replace(report, quality=quality)
    reason = f"its score falls from {torch:.3g} to {engine:.3g}, and {LARGEST_DROP:g} is allowed"
    return replace(report, quality=quality, failure=Failure("quality", reason))
