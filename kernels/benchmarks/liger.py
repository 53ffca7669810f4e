"""Liger-Kernel's implementations (arXiv 2410.10989) as rivals, where it is installed and there is a GPU.

Each function takes the arguments of ours, and gives Liger's own the layout that it likes, outside the clock.
"""

import importlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .measure import Variant

Make = Callable[..., Variant]


def liger(make: Make) -> dict[str, Make]:
    """The rival by its name, or nothing where it cannot run."""
    return {"liger": make} if torch.cuda.is_available() and find_spec("liger_kernel") else {}


@cache
def _apply(name: str) -> Callable[..., Any]:
    """An autograd function of Liger's, ready to call."""
    function: Callable[..., Any] = getattr(importlib.import_module("liger_kernel.ops"), name).apply
    return function


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float) -> Variant:
    """Its GroupNorm, then torch's SiLU."""

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normed = _apply("LigerGroupNormFunction")(x, weight, bias, x.shape[1], groups, epsilon)
        return functional.silu(normed.reshape(x.shape))

    return Variant(run, (x.contiguous(), weight, bias), (0, 1, 2))


def layer_norm(x: Tensor, scale: None, shift: None, weight: Tensor, bias: Tensor, epsilon: float, kind: str) -> Variant:
    """Its LayerNorm, which modulates nothing."""
    return Variant(_apply("LigerLayerNormFunction"), (x, weight, bias, epsilon), (0, 1, 2))


def rms_norm(x: Tensor, scale: None, shift: None, weight: Tensor, bias: None, epsilon: float, kind: str) -> Variant:
    """Its RMSNorm, which modulates nothing."""
    return Variant(_rms_norm, (x, weight, epsilon), (0, 1))


def modulated_rms_norm(x: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> Variant:
    """Its modulated RMSNorm."""

    def run(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed: Tensor = _apply("LigerModulatedRMSNormFunction")(x, None, scale, shift, 1e-6, 0.0, "llama", False)
        return normed

    return Variant(run, (x, scale, shift), (0, 1, 2))


def norm_rotary(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float
) -> Variant:
    """Its RMSNorm twice, then its rotation, which pairs channels half a head apart; as many numbers, other ones."""

    def run(query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor) -> tuple[Tensor, Tensor]:
        normed = [_rms_norm(query, query_weight, epsilon), _rms_norm(key, key_weight, epsilon)]
        turned = _apply("LigerRopeFunction")(*(each.transpose(1, 2) for each in normed), cos[None], sin[None])
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)

    return Variant(run, (query, key, query_weight, key_weight), (0, 1, 2, 3))


def gated_linear_unit(x: Tensor, activation: str, dim: int) -> Variant:
    """Its GEGLU (tanh's GELU only) or SwiGLU, which take the halves apart."""
    name = {"gelu": "LigerGELUMulFunction", "silu": "LigerSiLUMulFunction"}[activation]
    value, gate = (half.contiguous() for half in x.chunk(2, dim))
    return Variant(_apply(name), (gate, value), (0, 1))


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    normed: Tensor = _apply("LigerRMSNormFunction")(x, weight, epsilon, 0.0, "llama", False)
    return normed
