"""The second shape of an export: each network of a model as a graph of its own, which samplers call as they like.

It is for models with text encoders of their own, for those too large for one graph, and for teachers. Its folder is
laid out as Hugging Face optimum lays it out.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..runtime.artefact import INDEX, read_card
from ..runtime.engines import PIXELS, Arrays, Engines
from ..runtime.engines.manifest import Manifest
from ..runtime.engines.parts import AUTOENCODER, DECODER, IMAGES, LATENTS, Parts, model_of, part_file
from ..runtime.errors import FewstepError
from ..runtime.families import family_of, load_model
from ..runtime.files import read_json, write_json
from ..runtime.networks import Networks
from ..runtime.noise import trajectory_noise
from ..runtime.wording import either, in_steps
from .calls import Call, Recalled, watched
from .differences import END_TO_END, part_tolerances
from .graph import Graph, part_graph
from .large import is_large
from .nodes import keeping
from .parity import (
    BATCHES,
    BATCHES_OF_LARGE,
    ParityReport,
    Score,
    Trial,
    attempt,
    judge,
    prompts_of,
    seeds_of_batches,
    with_quality,
)
from .source import check_weights

TARGETS = ("onnx", "openvino")
"""Those that optimum has too."""
TEACHER_STEPS = 2
"""Of a teacher's trajectories where they are compared: one from noise, and one from what the first gave."""
CPU = torch.device("cpu")
_SIZES: Mapping[str, Sequence[str]] = {
    "sample": ("", "height", "width"),
    "hidden_states": ("", "height", "width"),
    LATENTS: ("", "height", "width"),
}
_TOKENS: Mapping[str, Sequence[str]] = {"encoder_hidden_states": ("tokens", "")}
"""Inputs of which more than the batch is dynamic; the first only where networks take other sizes than the model's."""


Shape = tuple[int, int, int]
"""(C, h, w) of a latent."""


class Setting(NamedTuple):
    """One way to make images."""

    steps: int
    sampler: str
    guidance: float


@dataclass(frozen=True)
class OpenedParts:
    """An export, opened.

    Args:
        engines: by part.
        networks: the model that they make.
    """

    engines: Parts
    networks: Networks


class PartsSource:
    """What an export in parts is made from: as `Source`, but for every step count at once.

    Args:
        directory: a student's or a teacher's.
        kernels: keep our kernels as nodes of the graphs; see `nodes`.

    Raises:
        FewstepError: not a model, or its weights are not its card's.
    """

    steps = None

    def __init__(self, directory: Path, kernels: bool = False) -> None:
        self.directory, self.card, self.kernels = directory, read_card(directory), kernels
        self.key = self.card.engine_key(None)
        check_weights(directory, self.card)

    @cached_property
    def networks(self) -> dict[str, nn.Module]:
        """Each network in torch, by the name of its folder, in the order in which they run."""
        model = self._reference.model
        decode: Any = model.decoder.decode
        own = {family_of(self.directory).NETWORK: model.network, DECODER: decode}
        return {**self._reference.text_encoder.networks, **own}

    @property
    def graphs(self) -> Mapping[str, Graph]:
        """Each network as ONNX, by the name of its folder."""
        return self._sized[0]

    @cached_property
    def _sized(self) -> tuple[Mapping[str, Graph], Shape | None]:
        """The graphs, and a latent of one and a half the height that they take too; None where they take no other."""
        channels, height, width = self._reference.model.sample_shape
        taller = channels, height + height // 2, width
        graphs = self._translated({**_TOKENS, **_SIZES})
        if self._take(graphs, taller):
            return graphs, taller
        return self._translated(_TOKENS), None

    def _translated(self, sizes: Mapping[str, Sequence[str]]) -> dict[str, Graph]:
        with watched(self.networks) as calls:
            self._draw(self._reference, self._settings[0], range(2))
        with keeping(list(self.networks.values()) if self.kernels else []):
            return {name: self._graph(name, call, sizes) for name, call in calls.items()}

    def _take(self, graphs: Mapping[str, Graph], shape: Shape) -> bool:
        """Whether networks and graphs take a latent: the exporter calls sizes dynamic that a network has looked at."""
        try:
            with watched(self.networks) as calls:
                self._draw(self._reference, self._settings[0], range(2), shape)
            for name, call in calls.items():
                inputs, _ = _inputs(name, call)
                graphs[name].program.module()(*(inputs[each] for each in graphs[name].example))
        except (AssertionError, RuntimeError, ValueError):  # a guard of the program; sizes that do not fit
            return False
        return True

    def require_target(self, target: str) -> None:
        """Refuse a target that holds whole trajectories alone."""
        if target not in TARGETS:
            raise FewstepError(f"exports in parts are for {either(TARGETS)}, not for {target}: use --shape fused")

    def place(self, folder: Path, name: str, target: str) -> tuple[Path, str]:
        """Where the file of a part goes, and its name without the suffix."""
        return folder / name, part_file(target)

    def furnish(self, folder: Path) -> None:
        """Write what optimum wants beside the graphs: index, scheduler, tokenizers, and each part's configuration."""
        index = read_json(self.directory / INDEX)
        for name, kind in index.items():
            if name.startswith(("scheduler", "tokenizer")) and (self.directory / name).is_dir():
                shutil.copytree(self.directory / name, folder / name)
            elif isinstance(kind, list) and name not in (AUTOENCODER, *self.networks):
                index[name] = [None, None]
        for name in self.networks:
            config = self.directory / (AUTOENCODER if name == DECODER else name) / "config.json"
            if config.is_file():
                shutil.copyfile(config, folder / name / config.name)
        write_json(folder / INDEX, index)

    def open(self, folder: Path, manifest: Manifest) -> OpenedParts:
        """What was written."""
        engines = Parts(folder, manifest)
        return OpenedParts(engines, Networks(manifest.engine, model_of(self.directory, engines), CPU))

    def compare(self, opened: OpenedParts, precision: str, score: Score | None) -> tuple[ParityReport, Trial]:
        """Each part on what torch gives it, and all in turn, at every step count and two sizes; see `check_parity`."""
        large = any(is_large(graph.model) for graph in self.graphs.values())
        *batches, others = seeds_of_batches((*(BATCHES_OF_LARGE if large else BATCHES), 1))
        shape, (_, taller) = self._reference.model.sample_shape, self._sized
        trials = [self._trial(opened, setting, seeds, shape) for setting in self._settings for seeds in batches]
        if taller:
            trials.append(self._trial(opened, self._settings[0], others, taller))
        target = opened.engines.manifest.target
        report, trial = judge(target, precision, part_tolerances(precision, list(self.networks)), trials)
        if score and not report.failure:
            report = with_quality(report, *map(score, self.rivals(opened)))
        return report, trial

    def rivals(self, opened: OpenedParts) -> tuple[Engines, Engines]:
        """What draws the same for a score: torch in float32, and what was opened."""
        reference, found = (
            networks.engines(self.card, *self._settings[0]) for networks in (self._reference, opened.networks)
        )
        return reference, found

    def calls(self, opened: OpenedParts) -> dict[str, Callable[[], object]]:
        """Drawing one image, to be measured: with the engine, and with torch where it would run."""
        rivals = {"engine": opened.networks, "torch": self._contender}
        return {name: partial(self._draw, networks, self._settings[0], range(1)) for name, networks in rivals.items()}

    @cached_property
    def _reference(self) -> Networks:
        return Networks("torch", load_model(self.directory, CPU), CPU)

    @cached_property
    def _contender(self) -> Networks:
        if not torch.cuda.is_available():
            return self._reference
        device = torch.device("cuda")
        return Networks("torch", load_model(self.directory, device), device)

    @property
    def _settings(self) -> list[Setting]:
        card = self.card
        if card.kind == "student":
            return [Setting(steps, card.sampler, 1.0) for steps in card.steps]
        return [Setting(TEACHER_STEPS, card.sampler, card.guidance)]

    def _draw(
        self, networks: Networks, setting: Setting, seeds: Sequence[int], shape: Shape | None = None
    ) -> npt.NDArray[np.uint8]:
        """Pixels; a student that takes the guidance scale is given its own, the lowest and the highest in turn."""
        engines = networks.engines(self.card, *setting)
        noise = trajectory_noise(seeds, engines.draws, shape or engines.sample_shape)
        condition = {name: value.numpy() for name, value in networks.text_encoder(prompts_of(seeds)).items()}
        if self.card.guidance_range:
            scales = np.array([self.card.guidance, *self.card.guidance_range], np.float32)
            condition["guidance"] = np.resize(scales, len(seeds))
        pixels: npt.NDArray[np.uint8] = engines.trajectory(noise=noise, **condition)[PIXELS]
        return pixels

    def _graph(self, name: str, call: Call, known: Mapping[str, Sequence[str]]) -> Graph:
        inputs, parameters = _inputs(name, call)
        module = Recalled(self.networks[name], call, parameters)
        sizes = {each: known[each] for each in inputs if each in known}
        return part_graph(module, inputs, list(_outputs(name, call)), sizes)

    def _trial(self, opened: OpenedParts, setting: Setting, seeds: Sequence[int], shape: Shape) -> Trial:
        with watched(self.networks) as calls:
            pixels = self._draw(self._reference, setting, seeds, shape)
        inputs = {name: _arrays(_inputs(name, call)[0]) for name, call in calls.items()}
        expected = {name: _arrays(_outputs(name, call)) for name, call in calls.items()}

        def run(name: str) -> Arrays:
            found = opened.engines[name](**inputs[name])
            return {each: found[each] for each in expected[name]}

        attempts: dict[str, Callable[[], Any]] = {name: partial(run, name) for name in calls}
        attempts[END_TO_END] = partial(self._draw, opened.networks, setting, seeds, shape)
        all_expected = {**expected, END_TO_END: pixels}
        found, errors = attempt(attempts, all_expected)
        how = f"{in_steps(setting.steps)}, {pixels.shape[2]}x{pixels.shape[1]} pixels"
        return Trial(prompts_of(seeds), seeds, inputs, all_expected, found, errors, how)


def _inputs(name: str, call: Call) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a part takes, and the network's parameters, both by the names that optimum gives to inputs."""
    if name == DECODER:
        ((parameter, latents),) = call.inputs.items()
        return {LATENTS: latents}, {LATENTS: parameter}
    inputs = dict(call.inputs)
    if name == "unet":  # optimum gives all images of a batch one time, as samplers do
        inputs["timestep"] = inputs["timestep"][0]
    return inputs, {each: each for each in inputs}


def _outputs(name: str, call: Call) -> dict[str, Tensor]:
    """What a part gives, by the names that optimum gives to outputs."""
    if name == DECODER:
        return {IMAGES: call.outputs["0"]}
    if name.startswith("text_encoder"):
        return call.outputs
    return {f"out_{next(iter(call.inputs))}": call.outputs["0"]}


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: value.numpy() for name, value in tensors.items()}
