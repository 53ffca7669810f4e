"""Batches are pure functions of (step, phase), and epochs visit every sample once."""

import pytest
import torch

from fewstep.training.batches import ImageBatches, LatentBatches, batch_indices
from fewstep.training.text_cache import TextCache

CPU = torch.device("cpu")


@pytest.fixture
def latent_batches() -> LatentBatches:
    """Seven samples whose latent is their number; sample n has n % 3 + 1 captions, which hold n and the variant."""
    counts = torch.tensor([n % 3 + 1 for n in range(7)])
    first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    captions = [[n, variant] for n in range(7) for variant in range(n % 3 + 1)]
    states = torch.tensor(captions, dtype=torch.float16).reshape(-1, 1, 2)
    conditions = {"encoder_hidden_states": states, "encoder_attention_mask": torch.ones(len(captions), 1)}
    text = TextCache(conditions, first, torch.arange(len(captions)))
    latents = torch.arange(7.0).reshape(-1, 1, 1, 1).expand(-1, 4, 2, 2)
    return LatentBatches(latents, text, batch_size=3, seed=5, device=CPU)


@pytest.mark.parametrize(("batch_size", "count"), [(3, 7), (4, 4), (5, 2), (1, 3)])
def test_every_epoch_visits_every_sample_once(batch_size: int, count: int) -> None:
    steps = count * 4  # a whole number of epochs
    order = torch.cat([batch_indices(step, 0, batch_size, count, seed=1) for step in range(steps)])
    for epoch in order.reshape(-1, count):
        assert epoch.sort().values.tolist() == list(range(count))


def test_order_differs_between_epochs_phases_and_seeds() -> None:
    orders = [
        batch_indices(step, phase, 50, 50, seed).tolist()
        for step, phase, seed in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_that_is_changed_changes_no_other() -> None:
    """Permutations are kept; more of them than that are asked for in between."""
    before = batch_indices(1, 0, 4, 10, seed=2)
    kept = before.clone()
    before.zero_()
    for seed in range(20):
        batch_indices(1, 0, 4, 10, seed)
    assert torch.equal(batch_indices(1, 0, 4, 10, seed=2), kept)


def test_batch_of_a_step_can_be_asked_for_again(latent_batches: LatentBatches) -> None:
    later = latent_batches(8, 1)
    latent_batches(0, 0)
    torch.randn(3)  # the global generator plays no part
    again = latent_batches(8, 1)
    assert torch.equal(later.x_0, again.x_0)
    assert all(torch.equal(value, again.condition[name]) for name, value in later.condition.items())


def test_latents_come_with_a_caption_of_their_own_and_every_variant_is_used(latent_batches: LatentBatches) -> None:
    seen = set()
    for step in range(60):
        batch = latent_batches(step, 0)
        sample, caption = batch.x_0[:, 0, 0, 0], batch.condition["encoder_hidden_states"]
        assert caption.dtype == torch.float32
        assert torch.equal(sample, caption[:, 0, 0])
        seen |= {(int(n), int(variant)) for n, variant in caption[:, 0].tolist()}
    assert seen == {(n, variant) for n in range(7) for variant in range(n % 3 + 1)}


def test_images_are_mirrored_half_of_the_time_and_lie_in_the_unit_range() -> None:
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    images[:, :, :, 1] = 255
    batches = ImageBatches(images, batch_size=50, seed=0, device=CPU)
    seen = torch.cat([batches(step, 0) for step in range(20)])
    assert seen.unique().tolist() == [-1, 1]
    mirrored = seen[:, 0, 0, 0] == 1
    assert torch.equal(seen[mirrored].flip(-1), seen[~mirrored][:1].expand_as(seen[mirrored]))
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(batches(7, 0), batches(7, 0))
