"""Features of real images are computed once, and again whenever they would be wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.training.data.packed import CaptionedImages
from fewstep.training.evaluation.features import FeatureNetwork
from fewstep.training.evaluation.reference import Reference, join, load_reference


class Counter:
    """Counts the images that went through the network."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, done: int, total: int) -> None:
        self.images = done


@pytest.fixture
def few(data: CaptionedImages) -> CaptionedImages:
    return CaptionedImages(data.images[:3], data.captions[:3], data.labels[:3], data.styles[:3], "few")


def test_the_second_call_reads(few: CaptionedImages, network: FeatureNetwork, tmp_path: Path) -> None:
    cache, first, second = tmp_path / "packed" / "features.safetensors", Counter(), Counter()
    computed = load_reference(few, network, cache, first)
    read = load_reference(few, network, cache, second)
    assert (first.images, second.images) == (3, 0)
    assert torch.equal(read.features, computed.features)
    assert [file.name for file in cache.parent.iterdir()] == ["features.safetensors"]


def test_other_data_are_computed(few: CaptionedImages, network: FeatureNetwork, tmp_path: Path) -> None:
    cache, counter = tmp_path / "features.safetensors", Counter()
    before = load_reference(few, network, cache)
    changed = replace(few, images=few.images.flip(0), identity="changed")
    after = load_reference(changed, network, cache, counter)
    assert counter.images == 3
    torch.testing.assert_close(after.features, before.features.flip(0), atol=1e-4, rtol=1e-4)


def test_another_network_computes_again(few: CaptionedImages, tmp_path: Path) -> None:
    cache, counter = tmp_path / "features.safetensors", Counter()
    network = FeatureNetwork()
    load_reference(few, network, cache)
    network.identity = "other weights"
    load_reference(few, network, cache, counter)
    assert counter.images == 3


def test_a_broken_file_is_replaced(few: CaptionedImages, network: FeatureNetwork, tmp_path: Path) -> None:
    cache, counter = tmp_path / "features.safetensors", Counter()
    whole = load_reference(few, network, cache)
    cache.write_bytes(cache.read_bytes()[:100])
    assert torch.equal(load_reference(few, network, cache).features, whole.features)
    load_reference(few, network, cache, counter)
    assert counter.images == 0


def test_a_folder_that_cannot_be_written_still_serves(
    few: CaptionedImages, network: FeatureNetwork, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    reference = load_reference(few, network, tmp_path / "file" / "features.safetensors")
    assert reference.features.shape == (3, network.num_features)


def test_a_caption_stands_for_a_label_that_is_unknown(
    few: CaptionedImages, network: FeatureNetwork, tmp_path: Path
) -> None:
    unlabelled = replace(few, labels=("", "known", ""), styles=("", "", ""))
    reference = load_reference(unlabelled, network, tmp_path / "features.safetensors")
    assert reference.shown == ((few.captions[0][0], ""), ("known", ""), (few.captions[2][0], ""))


def test_join_keeps_images_and_what_they_show_together(reference: Reference) -> None:
    joined = join([reference, reference])
    count = len(reference.shown)
    assert torch.equal(joined.features[count:], reference.features)
    assert joined.shown[count:] == reference.shown
