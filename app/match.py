"""match@1 of engines whose weights or activations have few bits: their pictures differ, but must not show less."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..runtime.engines.manifest import QUANTISED
from ..runtime.errors import FewstepError

if TYPE_CHECKING:
    from ..export.parity import Score
    from ..export.source import Source
    from ..runtime.engines import Engines

IMAGES, BATCH = 256, 8
"""Where one picture in fifty changes sides, that many scatter by 0.009; half the drop that the gate allows."""


def score_if_possible(source: "Source", precision: str, data: Path | None) -> "Score | None":
    """What `match_score` gives for a precision of few bits; without data, or other pictures, a sentence and None.

    Raises:
        FewstepError: there is no such data.
    """
    if precision not in QUANTISED:
        return None
    if data is not None and not data.is_dir():
        raise FewstepError(f"there is no folder {data}: give --data with the pictures that the student was trained on")
    try:
        if data is None:
            raise FewstepError("give --data with the pictures that the student was trained on")
        return match_score(source, data)
    except FewstepError as error:
        typer.echo(f"fewstep: the match@1 of {precision} is not compared with torch's: {error}", err=True)
        return None


def match_score(source: "Source", data: Path) -> "Score":
    """Match@1 over `IMAGES` captions of training, from fixed seeds; see `export.parity.Score`.

    Args:
        source: a student with the built-in text encoder.
        data: captioned pictures, those that it was trained on.

    Raises:
        FewstepError: the data or the evaluation extra is missing, or the text encoder is not the built-in one.
    """
    import numpy as np
    import torch

    from ..export.parity import make_inputs
    from ..training.evaluation.features import FeatureNetwork
    from ..training.evaluation.metrics import match_at_1
    from ..training.evaluation.reference import shown_by
    from ..training.evaluation.split import open_split, prompt_positions

    tokenize, network = source.encoder.tokenize, FeatureNetwork()
    split = open_split(data, "train", network, lambda stage, done, total: None)
    positions = prompt_positions(len(split.images.captions), IMAGES)
    prompts = [split.images.captions[position][0] for position in positions]
    shown = shown_by(split.images)
    wanted = [shown[position] for position in positions]

    def score(engines: "Engines") -> float:
        features = []
        for start in range(0, IMAGES, BATCH):
            part = slice(start, start + BATCH)
            inputs = make_inputs(tokenize, source.reference, prompts[part], range(IMAGES)[part])
            pixels = torch.from_numpy(np.ascontiguousarray(engines(*inputs).transpose(0, 3, 1, 2)))
            with torch.inference_mode():
                features.append(network(pixels))
        return match_at_1(torch.cat(features), split.gallery.features, wanted, split.gallery.shown)[0]

    return score
