"""Text states of the prompts met last: each prompt is encoded once."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from threading import Lock

import numpy as np
from torch import Tensor

from .engines import Arrays, Engines
from .text import PromptEncoder, load_tokenizer

MOST_BYTES = 2**26
"""64 MiB: some 1,800 prompts of the built-in encoder, or a dozen of Stable Diffusion 3."""


class PromptCache:
    """Gives the condition of prompts, and forgets those not asked for the longest.

    Every prompt is encoded alone, never with its batch, for an encoder rounds otherwise in another batch: states from
    the cache and fresh ones are equal to the bit.

    Args:
        encode: one prompt to its condition's arrays, batch 1.
        capacity: bytes that are kept at most.
    """

    def __init__(self, encode: Callable[[str], Arrays], capacity: int = MOST_BYTES) -> None:
        self._encode, self._capacity, self._size = encode, capacity, 0
        self._rows: OrderedDict[str, Arrays] = OrderedDict()
        self._lock = Lock()

    def __call__(self, prompts: Sequence[str]) -> Arrays:
        """The condition of the prompts, one row each; the caller's own."""
        rows = {prompt: self._row(prompt) for prompt in dict.fromkeys(prompts)}
        return {name: np.concatenate([rows[prompt][name] for prompt in prompts]) for name in rows[prompts[0]]}

    def _row(self, prompt: str) -> Arrays:
        with self._lock:
            if prompt in self._rows:
                self._rows.move_to_end(prompt)
                return self._rows[prompt]
        row = self._encode(prompt)  # outside the lock: other threads may find what they need meanwhile
        with self._lock:
            if prompt not in self._rows:
                self._size += _bytes(row)
            self._rows[prompt] = row
            while self._size > self._capacity:
                self._size -= _bytes(self._rows.popitem(last=False)[1])
        return row


def engine_prompts(engines: Engines) -> PromptCache:
    """Prompts as the text encoder of an export has them."""
    tokenize = load_tokenizer()
    return PromptCache(lambda prompt: engines.condition(_arrays(tokenize([prompt]))))


def torch_prompts(encoder: PromptEncoder) -> PromptCache:
    """Prompts as an encoder in torch has them."""
    return PromptCache(lambda prompt: _arrays(encoder([prompt])))


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: value.numpy() for name, value in tensors.items()}


def _bytes(row: Arrays) -> int:
    return sum(array.nbytes for array in row.values())
