"""What generated images are compared with: which captions, which pictures, and what is kept of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fewstep.runtime.errors import FewstepError
from fewstep.training.data.packed import CaptionedImages
from fewstep.training.evaluation.evaluate import evaluate
from fewstep.training.evaluation.features import FeatureNetwork
from fewstep.training.evaluation.split import open_split, prompt_positions, sample


def test_prompts_are_the_same_for_all_and_nested() -> None:
    whole = prompt_positions(50, 50)
    assert sorted(whole) == list(range(50))
    assert whole != sorted(whole)
    assert prompt_positions(50, 20) == whole[:20]
    assert prompt_positions(50, 70) == whole + whole[:20]


def test_held_out_prompts_find_their_answer_in_the_gallery(folder: Path, network: FeatureNetwork) -> None:
    split = open_split(folder, "validation", network, lambda stage, done, total: None)
    assert len(split.reference.shown) == 8
    assert len(split.gallery.shown) == 20
    held_out = split.images
    known = {captions[0]: image for captions, image in zip(held_out.captions, held_out.images, strict=True)}

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        return torch.stack([known[prompt] for prompt in prompts]).permute(0, 2, 3, 1).numpy()

    assert evaluate(generate, split, network, count=8, seed=0).match_style_at_1 == 1


def test_features_are_computed_once(folder: Path, network: FeatureNetwork) -> None:
    stages: list[str] = []

    def report(stage: str, done: int, total: int) -> None:
        stages.append(stage)

    first = open_split(folder, "validation", network, report)
    assert set(stages) == {"real, validation", "real, train"}
    stages.clear()
    again = open_split(folder, "validation", network, report)
    assert stages == []
    assert torch.equal(again.gallery.features, first.gallery.features)


def test_a_large_split_is_sampled_for_good(data: CaptionedImages) -> None:
    assert sample(data) is data
    some, again, fewer = sample(data, 9), sample(data, 9), sample(data, 8)
    assert some.captions == again.captions
    assert len(set(some.captions)) == 9
    assert len({some.identity, fewer.identity, data.identity}) == 3  # features of one never pass for another's
    for image, captions, label, style in zip(some.images, some.captions, some.labels, some.styles, strict=True):
        position = data.captions.index(captions)
        assert torch.equal(image, data.images[position])
        assert (label, style) == (data.labels[position], data.styles[position])


def test_an_unknown_split_is_refused(folder: Path, network: FeatureNetwork) -> None:
    with pytest.raises(FewstepError, match='no split "test": choose from train, validation'):
        open_split(folder, "test", network, lambda stage, done, total: None)
