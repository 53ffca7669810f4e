"""Captions are encoded once, kept in a file, and given out to the samples they belong to."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.text import TOKENS, TextEncoder, Tokenizer
from fewstep.training.text_cache import cache_text

CAPTIONS = [("red", "a red one"), ("blue",), ("red", "crimson", "scarlet")]


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, prompts: list[str], max_length: int, **_: object) -> dict[str, Tensor]:
        ids = torch.zeros(len(prompts), max_length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor([ord(letter) for letter in prompt[:max_length]])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Embedding(nn.Module):
    """States that tell which letters went in; counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.encoded += len(input_ids)
        return SimpleNamespace(last_hidden_state=torch.stack([input_ids, -input_ids], dim=-1).float())


@pytest.fixture
def encoder() -> TextEncoder:
    return TextEncoder(Tokenizer(Letters()), Embedding(), identity="letters")


def test_samples_get_the_states_of_the_caption_that_was_chosen(encoder: TextEncoder, tmp_path: Path) -> None:
    cache = cache_text(CAPTIONS, encoder, tmp_path)
    indices = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    choice = torch.tensor([0.0, 0.5, 0.0, 0.999, 0.0, 0.34, 0.67, 0.99999])
    expected = encoder(["red", "a red one", "blue", "blue", "red", "crimson", "scarlet", "scarlet"])
    condition = cache.condition(indices, choice)
    assert condition.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(condition[name], value)
        assert condition[name].dtype == value.dtype
    assert condition["encoder_hidden_states"].shape == (8, TOKENS, 2)


def test_every_distinct_caption_is_encoded_once_and_then_read(encoder: TextEncoder, tmp_path: Path) -> None:
    first = cache_text(CAPTIONS, encoder, tmp_path)
    assert encoder.model.encoded == 5
    again = cache_text(CAPTIONS, encoder, tmp_path)
    assert encoder.model.encoded == 5
    assert len(list(tmp_path.iterdir())) == 1
    assert first.conditions.keys() == again.conditions.keys()
    assert all(torch.equal(value, again.conditions[name]) for name, value in first.conditions.items())
    assert torch.equal(first.first, again.first)
    assert torch.equal(first.variants, again.variants)


def test_other_captions_or_another_encoder_are_encoded_anew(encoder: TextEncoder, tmp_path: Path) -> None:
    cache_text(CAPTIONS, encoder, tmp_path)
    cache_text([*CAPTIONS, ("green",)], encoder, tmp_path)
    assert encoder.model.encoded == 5 + 6
    cache_text(CAPTIONS, TextEncoder(encoder.tokenize, encoder.model, identity="other"), tmp_path)
    assert encoder.model.encoded == 5 + 6 + 5
    assert len(list(tmp_path.iterdir())) == 3


class Counting:
    """An encoder that names its condition in a way of its own."""

    identity = "counting"

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return {"pooled_projections": lengths[:, None] / 4, "letters": lengths}


def test_a_condition_of_any_names_comes_back_with_its_types(tmp_path: Path) -> None:
    cache = cache_text(CAPTIONS, Counting(), tmp_path)
    condition = cache.condition(torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.0, 0.4]))
    expected = Counting()(["a red one", "blue", "crimson"])
    assert condition.keys() == expected.keys()
    assert all(torch.equal(value, condition[name]) for name, value in expected.items())
    assert [condition[name].dtype for name in expected] == [torch.float32, torch.int64]
    assert cache.conditions["pooled_projections"].dtype == torch.float16


def test_the_same_captions_in_another_order_share_the_file(encoder: TextEncoder, tmp_path: Path) -> None:
    cache_text(CAPTIONS, encoder, tmp_path)
    turned = cache_text(CAPTIONS[::-1], encoder, tmp_path)
    assert encoder.model.encoded == 5
    blue = turned.condition(torch.tensor([1]), torch.zeros(1))
    assert torch.equal(blue["encoder_hidden_states"], encoder(["blue"])["encoder_hidden_states"])
