"""The discriminator: it knows prompt and time, whatever the layout of its features."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.training.discriminator import ConditionalHead, as_tokens, make_discriminator, pooled_text, time_features
from fewstep.training.method import Task


def test_padding_is_no_part_of_a_prompt() -> None:
    states = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    condition = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    pooled = pooled_text(condition, torch.zeros(3, 2))
    torch.testing.assert_close(pooled[0], states[0].mean(0))
    torch.testing.assert_close(pooled[1], states[1, :2].mean(0))
    assert not pooled[2].any()
    whole = pooled_text({"encoder_hidden_states": states}, torch.zeros(3, 2))
    torch.testing.assert_close(whole, states.mean(1))
    assert pooled_text({}, torch.zeros(3, 2)).shape == (3, 0)


def test_layout_of_features_does_not_matter() -> None:
    maps = torch.randn(2, 6, 3, 3)
    tokens = maps.reshape(2, 6, 9).transpose(1, 2)
    assert torch.equal(as_tokens(maps), tokens)
    assert as_tokens(torch.randn(2, 6)).shape == (2, 1, 6)
    head = ConditionalHead(6, 4)
    text, t = torch.randn(2, 4), torch.rand(2)
    torch.testing.assert_close(head(maps, text, t), head(tokens, text, t))
    assert head(maps, text, t).shape == (2,)


def test_times_are_told_apart() -> None:
    t = torch.linspace(0, 1, 51)
    distances = torch.cdist(time_features(t), time_features(t)) + 10 * torch.eye(51)
    assert distances.min() > 0.5


def accuracy(text: Tensor, t: Tensor, features: Tensor, real: Tensor) -> float:
    """Of a head trained on 2,000 samples, on 2,000 others."""
    head = ConditionalHead(features.shape[1], text.shape[1], hidden=32)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(150):
        logits = head(features[:2000], text[:2000], t[:2000])
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logits, real[:2000].float()).backward()
        optimizer.step()
    with torch.no_grad():
        judged = head(features[2000:], text[2000:], t[2000:]) > 0
    return float((judged == real[2000:]).float().mean())


def test_head_judges_by_the_prompt_and_by_the_time() -> None:
    """What is real depends on whether features and condition agree: either alone says nothing."""
    sign, real = torch.randn(4000, 1).sign(), torch.rand(4000) < 0.5
    agreeing = torch.where(real[:, None], sign, -sign)
    features = agreeing * torch.tensor([1.0, -1.0, 0.5, -0.5]) + 0.1 * torch.randn(4000, 4)
    nothing, middle = torch.zeros(4000, 1), torch.full((4000,), 0.5)
    assert accuracy(sign, middle, features, real) > 0.95
    assert accuracy(nothing, 0.5 + 0.3 * sign.squeeze(1), features, real) > 0.95
    assert accuracy(nothing, middle, features, real) < 0.6


def test_gradients_reach_the_sample_and_everything_that_is_trained(
    gaussian: Any, point_task: Callable[..., Task]
) -> None:
    judge = make_discriminator(point_task(gaussian(torch.zeros(2))))
    x = torch.randn(8, 2, requires_grad=True)
    judge(x, torch.rand(8), torch.rand(8), {}).sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    parameters = dict(judge.module.named_parameters())
    assert all(name.split(".")[0] in ("backbone", "head") for name in parameters)
    idle = {name for name, value in parameters.items() if value.grad is None or not value.grad.any()}
    assert idle == {"backbone.last.weight", "backbone.last.bias"}  # behind the features
