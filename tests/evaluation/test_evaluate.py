"""Whole evaluations, of generators whose scores are known."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from fewstep.runtime.errors import FewstepError
from fewstep.training.data.packed import CaptionedImages
from fewstep.training.evaluation.evaluate import Evaluation, Generate, evaluate, floors, prompt_positions
from fewstep.training.evaluation.features import FeatureNetwork
from fewstep.training.evaluation.reference import Reference
from fewstep.training.evaluation.sheet import save_sheet


def memory(data: CaptionedImages, shift: int = 0) -> Generate:
    """A generator that knows the data by heart, or with a shift mistakes each caption for another."""
    known = {
        captions[0]: data.images[(position + shift) % len(data.images)]
        for position, captions in enumerate(data.captions)
    }

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        return torch.stack([known[prompt] for prompt in prompts]).permute(0, 2, 3, 1).numpy()

    return generate


def noise(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
    """A generator that has learnt nothing."""
    return np.stack([np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8) for seed in seeds])


def run(generate: Generate, data: CaptionedImages, reference: Reference, network: FeatureNetwork) -> Evaluation:
    return evaluate(generate, data, reference, reference, network, count=len(data.captions), seed=0, batch_size=8)


def test_real_images_are_perfect_and_noise_is_not(
    data: CaptionedImages, reference: Reference, network: FeatureNetwork
) -> None:
    best, worst = run(memory(data), data, reference, network), run(noise, data, reference, network)
    assert best.fd == pytest.approx(0, abs=0.01)
    assert best.kid < best.kid_std
    assert (best.precision, best.recall, best.coverage) == (1, 1, 1)
    assert (best.match_at_1, best.match_style_at_1) == (1, 1)
    assert worst.fd > 50
    assert worst.kid > best.kid + 3 * best.kid_std
    assert (worst.precision, worst.recall, worst.density, worst.coverage) == (0, 0, 0, 0)
    assert worst.match_at_1 < 0.3


def test_real_images_in_the_wrong_style_are_seen_by_the_matches_alone(
    data: CaptionedImages, reference: Reference, network: FeatureNetwork
) -> None:
    pairs = list(range(len(data.images)))
    swapped = replace(data, images=data.images[[position ^ 1 for position in pairs]])  # the twin in the other style
    evaluation = run(memory(swapped), data, reference, network)
    assert (evaluation.match_at_1, evaluation.match_style_at_1) == (1, 0)
    assert evaluation.fd == pytest.approx(0, abs=0.01)
    # With captions two apart, not even the label is right
    assert run(memory(data, shift=2), data, reference, network).match_at_1 == 0


def test_an_evaluation_says_what_it_measured(
    data: CaptionedImages, reference: Reference, network: FeatureNetwork
) -> None:
    stages: dict[str, tuple[int, int]] = {}

    def report(stage: str, done: int, total: int) -> None:
        stages[stage] = (done, total)

    evaluation = evaluate(
        memory(data), data, reference, reference, network, count=12, seed=5, batch_size=5, report=report
    )
    assert stages == {"generate": (12, 12), "features": (12, 12)}
    entry = json.loads(json.dumps(evaluation.as_dict()))
    assert (entry["images"], entry["real_images"], entry["seed"]) == (12, 12, 5)
    assert (entry["data"], entry["feature_identity"]) == (data.identity, network.identity)
    assert entry["seconds"] > 0


def test_every_image_gets_a_prompt_and_a_seed_of_its_own(
    data: CaptionedImages, reference: Reference, network: FeatureNetwork
) -> None:
    asked: list[tuple[str, int]] = []
    remember = memory(data)

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        asked.extend(zip(prompts, seeds, strict=True))
        return remember(prompts, seeds)

    evaluation = evaluate(generate, data, reference, reference, network, count=25, seed=100, batch_size=8)
    prompts, seeds = zip(*asked, strict=True)
    canonical = [captions[0] for captions in data.captions]
    assert seeds == tuple(range(100, 125))
    assert sorted(prompts[:20]) == sorted(canonical)
    assert prompts[20:] == prompts[:5]
    assert (evaluation.images, evaluation.real_images) == (25, 20)


def test_prompts_are_the_same_for_all_and_nested() -> None:
    whole = prompt_positions(50, 50)
    assert sorted(whole) == list(range(50))
    assert whole != sorted(whole)
    assert prompt_positions(50, 20) == whole[:20]
    assert prompt_positions(50, 70) == whole + whole[:20]


def test_floors_bound_the_scores(data: CaptionedImages, reference: Reference, network: FeatureNetwork) -> None:
    limits = floors(reference, count=100)
    noisy = run(noise, data, reference, network)
    assert limits.halves.images == limits.halves.real_images == 10
    assert 0 < limits.halves.fd < noisy.fd
    assert limits.halves.kid < noisy.kid
    assert limits.halves.coverage > noisy.coverage
    assert limits.halves.match_style_at_1 == 0  # a half holds no second image of the same label and style
    assert limits.shuffled_match_at_1 < 0.5
    assert limits.shuffled_match_style_at_1 <= limits.shuffled_match_at_1
    assert floors(reference, count=6).halves.images == 6


def test_too_few_images_are_refused_before_generating(
    data: CaptionedImages, reference: Reference, network: FeatureNetwork
) -> None:
    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        raise AssertionError("nothing should be generated")

    with pytest.raises(FewstepError, match="5 images are too few to compare: give at least 6"):
        evaluate(generate, data, reference, reference, network, count=5, seed=0)
    with pytest.raises(FewstepError, match="5 images are too few to compare: give at least 6"):
        floors(reference, count=5)
    few = Reference(reference.features[:11], reference.shown[:11])
    with pytest.raises(FewstepError, match="11 images are too few to compare: give at least 12"):
        floors(few, count=8)


def test_images_of_another_size_are_refused(
    data: CaptionedImages, reference: Reference, network: FeatureNetwork
) -> None:
    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        return np.zeros((len(prompts), 8, 8, 3), dtype=np.uint8)

    with pytest.raises(FewstepError, match="the model makes 8 x 8 images but the data are 16 x 16"):
        evaluate(generate, data, reference, reference, network, count=6, seed=0)


def test_the_sheet_shows_real_above_generated(data: CaptionedImages, tmp_path: Path) -> None:
    real = np.full((7, 16, 16, 3), (200, 0, 0), dtype=np.uint8)
    fake = np.full((7, 16, 16, 3), (0, 0, 200), dtype=np.uint8)
    captions = [f"{'a very long caption ' * 9}{position}" for position in range(7)]
    save_sheet({"real": real, "generated": fake}, captions, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    red, blue = ((pixels == colour).all(axis=2) for colour in ((200, 0, 0), (0, 0, 200)))
    assert red.sum() == blue.sum() == 7 * 128 * 128
    for column in np.flatnonzero(red.any(axis=0)):
        assert np.flatnonzero(red[:, column])[0] < np.flatnonzero(blue[:, column])[0]
