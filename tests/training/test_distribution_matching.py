"""The distribution-matching loss against analytic scores, and the discriminator's parts."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.kernels.distribution_matching import distribution_matching_gradient
from fewstep.runtime.denoiser import add_noise, levels
from fewstep.training.distribution_matching import (
    FeatureHead,
    accuracy,
    as_map,
    call_with_features,
    discriminator_loss,
    generator_loss,
    gradient_loss,
    noise_level,
    twice,
)


def test_loss_has_the_gradient_it_was_given() -> None:
    x, gradient = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, 5).double()
    gradient_loss(x, gradient).backward()
    torch.testing.assert_close(x.grad, gradient / x.numel(), rtol=1e-12, atol=1e-15)


def test_scale_is_taken_per_sample() -> None:
    x, mu_fake, mu_real = torch.randn(3, 4, 2, 2, 2).unbind()
    before = distribution_matching_gradient(x, mu_fake, mu_real)
    x[1], mu_fake[1], mu_real[1] = 100 * x[1], 100 * mu_fake[1], 100 * mu_real[1]
    after = distribution_matching_gradient(x, mu_fake, mu_real)
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    torch.testing.assert_close(before[1], after[1])  # and it makes the gradient free of units


def test_gradient_is_the_difference_in_units_of_the_mean_offset() -> None:
    x, mu_fake, mu_real = torch.tensor([[3.0, -1.0]]), torch.tensor([[5.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    torch.testing.assert_close(distribution_matching_gradient(x, mu_fake, mu_real), torch.tensor([[2.0, 0.0]]))


def test_equal_scores_give_no_gradient() -> None:
    x, mu = torch.randn(2, 5, 3).unbind()
    assert not distribution_matching_gradient(x, mu, mu).any()


@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
def test_gradient_is_the_score_difference_of_gaussians(gaussian: Any, time: float) -> None:
    """`mu_fake - mu_real = sigma^2 / alpha (score_fake - score_real)` (Tweedie); descent moves towards the teacher."""
    real, fake = gaussian(torch.tensor([0.5, -0.2]), 0.5), gaussian(torch.tensor([-0.6, 0.9]), 0.3)
    x, t = fake.sample(4000), torch.full((4000,), time)
    x_t = add_noise(real.schedule, x, torch.randn_like(x), t)
    alpha, sigma = levels(real.schedule, t, x)
    mu_fake, mu_real = fake(x_t, t, {}), real(x_t, t, {})
    gradient = distribution_matching_gradient(x, mu_fake, mu_real)
    scale = (x - mu_real).abs().mean(1, keepdim=True)
    expected = sigma**2 / alpha * (fake.score(x_t, t) - real.score(x_t, t)) / scale
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
    moved = (x - 0.1 * gradient).mean(0)
    assert (moved - real.mean).norm() < 0.99 * (x.mean(0) - real.mean).norm()


def test_head_sees_tokens_as_the_map_they_come_from() -> None:
    head, features = FeatureHead(6, hidden=8), torch.randn(3, 6, 4, 4)
    tokens = features.flatten(2).transpose(1, 2)
    assert torch.equal(as_map(tokens), features)
    assert head(features).shape == (3,)
    torch.testing.assert_close(head(tokens), head(features))


def test_features_are_caught_and_the_hook_is_gone_afterwards() -> None:
    block = nn.Linear(3, 4)
    network, x = nn.Sequential(block, nn.ReLU()), torch.randn(2, 3)
    output, features = call_with_features(block, lambda: network(x))
    torch.testing.assert_close(features, block(x))
    torch.testing.assert_close(output, features.relu())

    def fail() -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        call_with_features(block, fail)
    assert not block._forward_hooks


def test_adversarial_losses_at_indifference_and_their_directions() -> None:
    logits = torch.zeros(4, requires_grad=True)
    assert discriminator_loss(logits, logits).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(logits).item() == pytest.approx(math.log(2))
    fake, real = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    discriminator_loss(fake, real).backward()
    generator_loss(logits).backward()
    assert (fake.grad > 0).all()  # descending lowers D(fake) and raises D(real), the generator raises D(fake)
    assert (real.grad < 0).all()
    assert (logits.grad < 0).all()


def test_accuracy_counts_fake_and_real_samples_alike() -> None:
    assert accuracy(torch.tensor([-1.0, -2.0]), torch.tensor([3.0])).item() == 1
    assert accuracy(torch.tensor([-1.0, 2.0, 2.0, 2.0]), torch.tensor([3.0])).item() == pytest.approx(0.625)


def test_noise_level_is_uniform_in_its_range() -> None:
    t, eps = noise_level(torch.zeros(4000, 2), (0.2, 0.6), torch.Generator().manual_seed(0))
    assert eps.shape == (4000, 2)
    assert (t.min(), t.max()) == (pytest.approx(0.2, abs=1e-3), pytest.approx(0.6, abs=1e-3))
    assert t.mean().item() == pytest.approx(0.4, abs=0.01)


def test_condition_holds_every_prompt_twice_in_order() -> None:
    both = twice({"text": torch.arange(3)})["text"]
    assert both.tolist() == [0, 1, 2, 0, 1, 2]
