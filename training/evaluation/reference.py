"""Real pictures as the metrics see them, kept beside the data once computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...runtime.errors import FewstepError
from ...runtime.files import atomic_path
from ..data.packed import CaptionedImages
from .features import Callback, FeatureNetwork, compute_features


@dataclass(frozen=True)
class Reference:
    """Features (N, D) of real images, with what each of them shows as (label, style)."""

    features: Tensor
    shown: tuple[tuple[str, str], ...]


def load_reference(
    data: CaptionedImages, network: FeatureNetwork, cache: Path, callback: Callback | None = None
) -> Reference:
    """Features of a data split, read from the file `cache` when they are of this very data and network.

    Otherwise they are computed, with `callback` as in `compute_features`, and written there if the folder allows it.
    """
    identity = {"data": data.identity, "network": network.identity}
    features = _read(cache, identity)
    if features is None:
        features = compute_features(network, data.images, callback)
        try:
            with atomic_path(cache) as temporary:
                save_file({"features": features}, temporary, metadata=identity)
        except (OSError, FewstepError):
            pass  # data on a read-only disk: the features serve from memory
    return Reference(features, shown_by(data))


def shown_by(data: CaptionedImages) -> tuple[tuple[str, str], ...]:
    """(label, style) of each image; its canonical caption stands for a label that is unknown."""
    labels = [label or captions[0] for label, captions in zip(data.labels, data.captions, strict=True)]
    return tuple(zip(labels, data.styles, strict=True))


def join(references: Sequence[Reference]) -> Reference:
    """All their images as one reference."""
    features = torch.cat([reference.features for reference in references])
    return Reference(features, tuple(entry for reference in references for entry in reference.shown))


def _read(cache: Path, identity: dict[str, str]) -> Tensor | None:
    if not cache.is_file():
        return None
    try:
        with safe_open(cache, framework="pt") as archive:
            return archive.get_tensor("features") if archive.metadata() == identity else None
    except SafetensorError:
        return None
