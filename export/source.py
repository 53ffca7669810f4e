"""A student at one step count: opened, traced and run in torch once, for all the targets that it is exported to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.artefact import Card, read_card, weights_hash
from ..runtime.engines import TEXT_ENCODER, TRAJECTORY, Arrays, Engine, Engines
from ..runtime.engines.torch import TorchEngine, torch_engines
from ..runtime.errors import FewstepError
from ..runtime.families import Model, load_model
from ..runtime.samplers import get_sampler
from ..runtime.text import CONDITION, TextEncoder
from ..runtime.trajectory import Trajectory
from .graph import Graph, TextStates, text_encoder_graph, trajectory_graph
from .parity import PROMPTS

CPU = torch.device("cpu")


class Source:
    """What an engine is made from; each part is made when first needed.

    Args:
        directory: the student's.
        steps: of the trajectory, one of the student's; None takes its first.

    Raises:
        FewstepError: not a student, not one of its step counts, or its weights are not its card's.
    """

    def __init__(self, directory: Path, steps: int | None = None) -> None:
        self.directory, self.card = directory, read_card(directory)
        self.steps = _check_steps(directory, self.card, steps)
        self.key = self.card.engine_key(self.steps)
        if weights_hash(directory) != self.card.weights:
            raise FewstepError(
                f"the weights in {directory} are not those of its fewstep.json: restore them or train again"
            )

    @cached_property
    def encoder(self) -> TextEncoder:
        """The student's text encoder; `FewstepError` if it is not the built-in one."""
        encoder = self._model.load_text_encoder()
        if not isinstance(encoder, TextEncoder):
            raise FewstepError(
                f"{self.directory} has text encoders of its own, and only the built-in one can be exported"
            )
        return encoder

    @cached_property
    def graphs(self) -> Mapping[str, Graph]:
        """Text encoder and trajectory as ONNX, by name."""
        condition = self.encoder(PROMPTS)
        if self.card.guidance_range:
            condition["guidance"] = torch.full((len(PROMPTS),), self.card.guidance)
        return {
            TEXT_ENCODER: text_encoder_graph(self._states, self.encoder.tokenize(PROMPTS)),
            TRAJECTORY: trajectory_graph(self._trajectory(self._model), self._model.sample_shape, condition),
        }

    @cached_property
    def reference(self) -> Engines:
        """The same in torch, on the CPU in float32."""
        return self._in_torch(self._model, CPU)

    @cached_property
    def contender(self) -> Engines:
        """The same where the pipeline would run torch: on the GPU, if there is one."""
        if not torch.cuda.is_available():
            return self.reference
        device = torch.device("cuda")
        return self._in_torch(load_model(self.directory, device), device)

    def at_its_guidance(self, engines: Engines) -> Engines:
        """The engines; of a student that takes the guidance scale as an input, always given the card's."""
        if self.card.guidance_range is None:
            return engines
        return replace(engines, trajectory=_AtGuidance(engines.trajectory, self.card.guidance))

    @cached_property
    def _model(self) -> Model:
        return load_model(self.directory, CPU)

    @cached_property
    def _states(self) -> TextStates:
        return TextStates(self.encoder)

    def _trajectory(self, model: Model) -> Trajectory:
        return Trajectory(model, get_sampler(self.card.sampler), self.card.times[str(self.steps)])

    def _in_torch(self, model: Model, device: torch.device) -> Engines:
        trajectory = self._trajectory(model)
        text_encoder = TorchEngine(self._states, CPU, output=CONDITION[0])
        return self.at_its_guidance(torch_engines(trajectory, model.sample_shape, device, text_encoder))


@dataclass(frozen=True)
class _AtGuidance:
    """A trajectory that takes the guidance scale, given always the same one."""

    engine: Engine
    scale: float

    def __call__(self, **arrays: npt.NDArray[Any]) -> Arrays:
        return self.engine(**arrays, guidance=np.full(len(arrays["noise"]), self.scale, np.float32))


def _check_steps(directory: Path, card: Card, steps: int | None) -> int:
    if card.kind != "student":
        raise FewstepError(f"{directory} is a teacher, and only students are exported: run `fewstep train dmd2`")
    if steps is None:
        return card.steps[0]
    if steps not in card.steps:
        known = " or ".join(map(str, card.steps))
        raise FewstepError(f"{directory} was distilled for {known} steps, not for {steps}: use --steps {card.steps[0]}")
    return steps
