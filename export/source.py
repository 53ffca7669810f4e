"""A student at one step count: opened, traced and run in torch once, for all the targets that it is exported to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.artefact import Card, read_card, require_steps, weights_hash
from ..runtime.engines import TEXT_ENCODER, TRAJECTORY, Arrays, Engine, Engines, load_engines
from ..runtime.engines.manifest import Manifest
from ..runtime.engines.torch import TorchEngine, torch_engines
from ..runtime.errors import FewstepError
from ..runtime.families import Model, load_model
from ..runtime.samplers import get_sampler
from ..runtime.text import CONDITION, TextEncoder
from ..runtime.trajectory import Trajectory
from .calibration import calibration_samples
from .graph import Graph, TextStates, text_encoder_graph, trajectory_graph
from .nodes import keeping
from .parity import PROMPTS, ParityReport, Score, Trial, check_parity, make_inputs

CPU = torch.device("cpu")


class Source:
    """What an engine is made from; each part is made when first needed.

    Args:
        directory: the student's.
        steps: of the trajectory, one of the student's; None takes its first.
        kernels: keep our kernels as nodes of the graph; see `nodes`.

    Raises:
        FewstepError: not a student, not one of its step counts, or its weights are not its card's.
    """

    def __init__(self, directory: Path, steps: int | None = None, kernels: bool = False) -> None:
        self.directory, self.card, self.kernels = directory, read_card(directory), kernels
        self.steps = _check_steps(directory, self.card, steps)
        self.key = self.card.engine_key(self.steps)
        check_weights(directory, self.card)

    @cached_property
    def encoder(self) -> TextEncoder:
        """The student's text encoder; `FewstepError` if it is not the built-in one."""
        encoder = self._model.load_text_encoder()
        if not isinstance(encoder, TextEncoder):
            raise FewstepError(f"{self.directory} has text encoders of its own: export it with --shape parts")
        return encoder

    @cached_property
    def graphs(self) -> Mapping[str, Graph]:
        """Text encoder and trajectory as ONNX, by name."""
        condition = self.encoder(PROMPTS)
        if self.card.guidance_range:
            condition["guidance"] = torch.full((len(PROMPTS),), self.card.guidance)
        trajectory = self._trajectory(self._model)
        with keeping([trajectory] if self.kernels else []):
            graph = trajectory_graph(trajectory, self._model.sample_shape, condition)
        return {
            TEXT_ENCODER: text_encoder_graph(self._states, self.encoder.tokenize(PROMPTS)),
            TRAJECTORY: replace(graph, samples=self._samples),
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

    def require_target(self, target: str) -> None:
        """Every target holds whole trajectories."""

    def place(self, folder: Path, name: str, target: str) -> tuple[Path, str]:
        """Where the file of a graph goes, and its name without the suffix."""
        return folder, name

    def furnish(self, folder: Path) -> None:
        """Nothing goes beside the graphs."""

    def open(self, folder: Path, manifest: Manifest) -> Engines:
        """What was written."""
        return self.at_its_guidance(replace(load_engines(folder, manifest), name=manifest.target))

    def compare(self, opened: Engines, precision: str, score: Score | None) -> tuple[ParityReport, Trial]:
        """See `check_parity`."""
        return check_parity(self.reference, opened, self.encoder.tokenize, precision, score)

    def rivals(self, opened: Engines) -> tuple[Engines, Engines]:
        """What draws the same for a score: torch in float32, and what was opened."""
        return self.reference, opened

    def calls(self, opened: Engines) -> dict[str, Callable[[], object]]:
        """Drawing one image, to be measured: with the engine, and with torch where it would run."""
        one_image = make_inputs(self.encoder.tokenize, self.reference, PROMPTS[:1], [0])
        return {"engine": partial(opened, *one_image), "torch": partial(self.contender, *one_image)}

    def at_its_guidance(self, engines: Engines) -> Engines:
        """The engines; of a student that takes the guidance scale as an input, always given the card's."""
        if self.card.guidance_range is None:
            return engines
        return replace(engines, trajectory=_AtGuidance(engines.trajectory, self.card.guidance))

    def _samples(self) -> list[Arrays]:
        samples = calibration_samples(self.reference, self.encoder.tokenize)
        guidance = {"guidance": np.full(1, self.card.guidance, np.float32)} if self.card.guidance_range else {}
        return [sample | guidance for sample in samples]

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


def check_weights(directory: Path, card: Card) -> None:
    """Refuse a model whose files changed: `FewstepError`."""
    if weights_hash(directory) != card.weights:
        raise FewstepError(f"the weights in {directory} are not those of its fewstep.json: restore them or train again")


def _check_steps(directory: Path, card: Card, steps: int | None) -> int:
    if card.kind != "student":
        raise FewstepError(
            f"{directory} is a teacher, and only students are exported as one graph: run `fewstep train dmd2`, or use "
            "--shape parts"
        )
    if steps is None:
        return card.steps[0]
    require_steps(directory, card.steps, steps)
    return steps
