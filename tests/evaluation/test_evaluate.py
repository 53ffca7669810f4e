"""Whole evaluations, of generators whose scores are known."""

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
from fewstep.training.evaluation import evaluate as evaluation_module
from fewstep.training.evaluation.evaluate import Evaluation, Generate, evaluate, floors
from fewstep.training.evaluation.features import FeatureNetwork
from fewstep.training.evaluation.reference import Reference
from fewstep.training.evaluation.sheet import save_sheet
from fewstep.training.evaluation.split import Split


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


def run(generate: Generate, split: Split, network: FeatureNetwork) -> Evaluation:
    return evaluate(generate, split, network, count=len(split.images.captions), seed=0, batch_size=8)


def test_real_images_are_perfect_and_noise_is_not(
    split: Split, network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_module, "FD_IMAGES", 20)
    best, worst = run(memory(split.images), split, network), run(noise, split, network)
    assert best.fd == pytest.approx(0, abs=0.01)
    assert best.kid < best.kid_std
    assert (best.precision, best.recall, best.coverage) == (1, 1, 1)
    assert (best.match_at_1, best.match_style_at_1) == (1, 1)
    assert worst.fd is not None
    assert worst.fd > 50
    assert worst.kid > best.kid + 3 * best.kid_std
    assert (worst.precision, worst.recall, worst.density, worst.coverage) == (0, 0, 0, 0)
    assert worst.match_at_1 < 0.3


def test_real_images_in_the_wrong_style_are_seen_by_the_matches_alone(split: Split, network: FeatureNetwork) -> None:
    data = split.images
    pairs = list(range(len(data.images)))
    swapped = replace(data, images=data.images[[position ^ 1 for position in pairs]])  # the twin in the other style
    evaluation = run(memory(swapped), split, network)
    assert (evaluation.match_at_1, evaluation.match_style_at_1) == (1, 0)
    assert (evaluation.precision, evaluation.recall, evaluation.coverage) == (1, 1, 1)
    # With captions two apart, not even the label is right
    assert run(memory(data, shift=2), split, network).match_at_1 == 0


def test_pictures_of_one_class_match_whichever_it_is(split: Split, network: FeatureNetwork) -> None:
    """As in Fashion-MNIST: few captions, each of many pictures, and any of these is right."""
    data = split.images
    classes = tuple("block" if position < 10 else "ring" for position in range(20))
    captions = tuple((name,) for name in classes)
    by_class = replace(data, captions=captions, labels=classes, styles=("",) * 20)
    reference = replace(split.reference, shown=tuple((name, "") for name in classes))
    first = {"block": data.images[0], "ring": data.images[19]}

    def one_each(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        return torch.stack([first[prompt] for prompt in prompts]).permute(0, 2, 3, 1).numpy()

    evaluation = run(one_each, Split("train", by_class, reference, reference), network)
    assert (evaluation.match_at_1, evaluation.match_style_at_1) == (1, 1)
    assert evaluation.coverage < 1


def test_diversity_is_of_the_seeds_alone(split: Split, network: FeatureNetwork) -> None:
    """A generator that knows one picture a caption has none; one that ignores its caption has all there is."""

    def any_picture(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        drawn = [int(np.random.default_rng(seed).integers(20)) for seed in seeds]
        return split.images.images[drawn].permute(0, 2, 3, 1).numpy()

    assert run(memory(split.images), split, network).diversity == pytest.approx(0, abs=1e-6)
    unrelated = floors(split, count=20).unrelated_distance
    assert run(any_picture, split, network).diversity == pytest.approx(unrelated, rel=0.25)
    assert unrelated > 0.05


def test_a_frechet_distance_of_few_images_is_not_given(split: Split, network: FeatureNetwork) -> None:
    assert run(noise, split, network).fd is None
    assert floors(split, count=20).halves.fd is None


def test_an_evaluation_says_what_it_measured(split: Split, network: FeatureNetwork) -> None:
    stages: dict[str, tuple[int, int]] = {}

    def report(stage: str, done: int, total: int) -> None:
        stages[stage] = (done, total)

    evaluation = evaluate(memory(split.images), split, network, count=12, seed=5, batch_size=5, report=report)
    assert stages == {"generate": (48, 48), "features": (48, 48)}  # three more of each, for the diversity
    assert (evaluation.images, evaluation.real_images, evaluation.seed) == (12, 12, 5)
    assert (evaluation.split, evaluation.data) == ("train", split.images.identity)
    assert evaluation.feature_identity == network.identity
    assert evaluation.seconds > 0


def test_every_image_gets_a_prompt_and_a_seed_of_its_own(split: Split, network: FeatureNetwork) -> None:
    asked: list[tuple[str, int]] = []
    remember = memory(split.images)

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        asked.extend(zip(prompts, seeds, strict=True))
        return remember(prompts, seeds)

    evaluation = evaluate(generate, split, network, count=25, seed=100, batch_size=8)
    prompts, seeds = zip(*asked, strict=True)
    canonical = [captions[0] for captions in split.images.captions]
    assert seeds == tuple(range(100, 185))
    assert sorted(prompts[:20]) == sorted(canonical)
    assert prompts[20:25] == prompts[:5]
    assert prompts[25:] == 3 * prompts[:20]  # for the diversity
    assert (evaluation.images, evaluation.real_images) == (25, 20)


def test_floors_bound_the_scores(split: Split, network: FeatureNetwork) -> None:
    limits = floors(split, count=100)
    noisy = run(noise, split, network)
    assert limits.halves.images == limits.halves.real_images == 10
    assert limits.halves.kid < noisy.kid
    assert limits.halves.coverage > noisy.coverage
    assert limits.halves.match_style_at_1 == 0  # a half holds no second image of the same label and style
    assert limits.shuffled_match_at_1 < 0.5
    assert limits.shuffled_match_style_at_1 <= limits.shuffled_match_at_1
    assert floors(split, count=6).halves.images == 6


def test_too_few_images_are_refused_before_generating(split: Split, network: FeatureNetwork) -> None:
    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        raise AssertionError("nothing should be generated")

    with pytest.raises(FewstepError, match="5 images are too few to compare: give at least 6"):
        evaluate(generate, split, network, count=5, seed=0)
    with pytest.raises(FewstepError, match="5 images are too few to compare: give at least 6"):
        floors(split, count=5)
    few = replace(split, reference=Reference(split.reference.features[:11], split.reference.shown[:11]))
    with pytest.raises(FewstepError, match="11 images are too few to compare: give at least 12"):
        floors(few, count=8)


def test_images_of_another_size_are_refused(split: Split, network: FeatureNetwork) -> None:
    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        return np.zeros((len(prompts), 8, 8, 3), dtype=np.uint8)

    with pytest.raises(FewstepError, match="the model makes 8 x 8 images but the data are 16 x 16"):
        evaluate(generate, split, network, count=6, seed=0)


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
