"""Every prompt is encoded once and alone, as long as there is room for it."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fewstep.runtime.engines import Arrays
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.prompt_cache import PromptCache

SIZE = 16
"""Bytes of a prompt's states."""


class Letters:
    """Encodes a prompt as its length and first letter, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompt: str) -> Arrays:
        self.asked.append(prompt)
        if prompt == "bad":
            raise FewstepError("this prompt cannot be encoded")
        return {"length": np.array([len(prompt)]), "letter": np.array([[ord(prompt[0])]])}


def test_rows_come_in_the_order_of_the_prompts() -> None:
    states = PromptCache(Letters())(["bb", "a", "bb"])
    np.testing.assert_array_equal(states["length"], [2, 1, 2])
    np.testing.assert_array_equal(states["letter"], [[ord("b")], [ord("a")], [ord("b")]])


def test_a_prompt_is_encoded_once() -> None:
    letters = Letters()
    cache = PromptCache(letters)
    for prompts in (["a", "b", "a"], ["b"], ["c", "a"]):
        cache(prompts)
    assert letters.asked == ["a", "b", "c"]


def test_the_least_recently_used_goes_first() -> None:
    letters = Letters()
    cache = PromptCache(letters, capacity=2 * SIZE)
    for prompt in ("a", "b", "a", "c", "a", "b"):  # c takes the place of b, and b then that of c
        cache([prompt])
    assert letters.asked == ["a", "b", "c", "b"]


def test_a_batch_larger_than_the_cache_is_served() -> None:
    letters = Letters()
    cache = PromptCache(letters, capacity=SIZE - 1)
    np.testing.assert_array_equal(cache(["a", "bb", "a"])["length"], [1, 2, 1])
    cache(["a"])
    assert letters.asked == ["a", "bb", "a"]


def test_what_a_caller_does_to_the_states_is_not_remembered() -> None:
    cache = PromptCache(Letters())
    cache(["a"])["length"][:] = 7
    assert cache(["a"])["length"] == [1]


def test_a_failure_is_not_remembered() -> None:
    letters = Letters()
    cache = PromptCache(letters)
    for _ in range(2):
        with pytest.raises(FewstepError, match="cannot be encoded"):
            cache(["bad"])
    assert letters.asked == ["bad", "bad"]


def test_threads_share_the_cache() -> None:
    cache = PromptCache(Letters(), capacity=4 * SIZE)
    prompts = ["a" * length for length in range(1, 9)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: int(cache([prompt])["length"][0]), prompts * 50))
    assert found == [len(prompt) for prompt in prompts] * 50
