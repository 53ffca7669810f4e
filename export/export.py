"""`fewstep export`: a student and a step count become an engine, checked and measured before it is kept."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.artefact import Card, read_card, weights_hash
from ..runtime.engines import TEXT_ENCODER, TRAJECTORY, Arrays, Engine, Engines, engine_module, load_engines
from ..runtime.engines.manifest import FORMAT, Manifest, key_of, processor, read_manifest, refusal, write_manifest
from ..runtime.engines.torch import TorchEngine
from ..runtime.errors import FewstepError
from ..runtime.families import Model, load_model
from ..runtime.files import atomic_path, sha256_of
from ..runtime.samplers import get_sampler
from ..runtime.text import CONDITION, TextEncoder, Tokenizer
from ..runtime.trajectory import Trajectory
from . import onnx, openvino
from .diagnosis import first_difference
from .graph import Graph, TextStates, text_encoder_graph, trajectory_graph
from .parity import PROMPTS, check_parity, make_inputs

WARM_UP_RUNS, TIMED_RUNS = 3, 20
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Target:
    """A file format that graphs are exported to, and the engine of that name loads.

    Args:
        precisions: gives what it can be built in on this machine, the default first.
        write: `write(graph, folder, name, precision)` writes one `onnx.ModelProto`.
    """

    precisions: Callable[[], tuple[str, ...]]
    write: Callable[[Any, Path, str, str], None]


TARGETS: dict[str, Target] = {
    "onnx": Target(onnx.precisions, onnx.write),
    "openvino": Target(openvino.precisions, openvino.write),
}
"""Every target by name; a new one is a file here, a file in `runtime/engines` and a line in each table."""


@dataclass(frozen=True)
class ExportReport:
    """What an export made or found.

    Args:
        folder: the engine's.
        manifest: what it holds, parity and times included.
        reused: whether it was there already, and still held.
    """

    folder: Path
    manifest: Manifest
    reused: bool

    def __str__(self) -> str:
        manifest = self.manifest
        times, worst = manifest.milliseconds, manifest.parity["worst"]
        state = "is up to date" if self.reused else "is written"
        return (
            f"{self.folder} {state}: {times['engine']:.1f} ms an image where torch takes {times['torch']:.1f} ms; "
            f"its images differ from torch's by {worst['mean']:.2g} of 255 ({worst['psnr']:.1f} dB) at worst"
        )


def export_student(
    directory: Path, target: str, steps: int | None = None, precision: str | None = None
) -> ExportReport:
    """Export a student as an engine beside it, `DIR/engines/<target>-<precision>-<steps>step-<key>/`.

    The engine appears whole, after its images agreed with torch's, or not at all; an older one of the same target,
    precision and steps goes. One that is there and still holds is kept as it is.

    Args:
        directory: the student's.
        target: a key of `TARGETS`.
        steps: of the trajectory, one of the student's; None takes its first.
        precision: None takes the target's fastest on this machine.

    Raises:
        FewstepError: not a student, an unknown target, step count or precision, a library is missing, or the images
            differ by more than the precision allows.
    """
    card, steps, precision = _check_request(directory, target, steps, precision)
    library = engine_module(target).library()
    folder = directory / "engines" / f"{target}-{precision}-{steps}step-{key_of(card.engine_key(steps), library)}"
    kept = _still_good(folder, card.engine_key(steps), library)
    if kept:
        return ExportReport(folder, kept, reused=True)
    try:
        with atomic_path(folder) as staging:
            staging.mkdir()
            manifest = _build(staging, directory, card, target, steps, precision, library)
            write_manifest(staging, manifest)
    finally:
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    for older in folder.parent.glob(f"{target}-{precision}-{steps}step-*"):
        if older != folder:
            shutil.rmtree(older)
    return ExportReport(folder, manifest, reused=False)


def _check_request(directory: Path, target: str, steps: int | None, precision: str | None) -> tuple[Card, int, str]:
    if target not in TARGETS:
        raise FewstepError(f"unknown export target {target!r}: choose {' or '.join(TARGETS)}")
    card = read_card(directory)
    if card.kind != "student":
        raise FewstepError(f"{directory} is a teacher, and only students are exported: run `fewstep train dmd2`")
    if steps is None:
        steps = card.steps[0]
    if steps not in card.steps:
        known = " or ".join(map(str, card.steps))
        raise FewstepError(f"{directory} was distilled for {known} steps, not for {steps}: use --steps {card.steps[0]}")
    if weights_hash(directory) != card.weights:
        raise FewstepError(f"the weights in {directory} are not those of its fewstep.json: restore them or train again")
    possible = TARGETS[target].precisions()
    if precision is not None and precision not in possible:
        raise FewstepError(f"{target} has no precision {precision!r} on this machine: choose {' or '.join(possible)}")
    return card, steps, precision or possible[0]


def _still_good(folder: Path, key: str, library: str) -> Manifest | None:
    if not folder.is_dir():
        return None
    try:
        manifest = read_manifest(folder)
    except FewstepError:
        return None
    return None if refusal(folder, manifest, key, library) else manifest


def _build(
    staging: Path, directory: Path, card: Card, target: str, steps: int, precision: str, library: str
) -> Manifest:
    """Write the graphs, and measure what they draw and how fast."""
    model = load_model(directory, CPU)
    encoder = model.load_text_encoder()
    if not isinstance(encoder, TextEncoder):
        raise FewstepError(f"{directory} has text encoders of its own, and only the built-in one can be exported")
    trajectory, states = _trajectory(model, card, steps), TextStates(encoder)
    condition = encoder(PROMPTS)
    if card.guidance_range:
        condition["guidance"] = torch.full((len(PROMPTS),), card.guidance)
    graphs = {
        TEXT_ENCODER: text_encoder_graph(states, encoder.tokenize(PROMPTS)),
        TRAJECTORY: trajectory_graph(trajectory, model.sample_shape, condition),
    }
    for name, graph in graphs.items():
        TARGETS[target].write(graph.model, staging, name, precision)
    manifest = Manifest(
        format=FORMAT,
        target=target,
        precision=precision,
        steps=steps,
        draws=trajectory.draws,
        sample_shape=model.sample_shape,
        built_from=card.engine_key(steps),
        library=library,
        processor=processor(),
        files={path.name: sha256_of(path) for path in sorted(staging.iterdir())},
        milliseconds={},
        parity={},
    )
    engines = _at_its_guidance(load_engines(staging, manifest), card)
    reference = _at_its_guidance(_torch_engines(trajectory, states, model.sample_shape), card)
    try:
        parity = check_parity(reference, engines, encoder.tokenize, precision)
    except FewstepError as error:
        place = _first_difference(graphs, staging, target, precision)
        raise FewstepError(f"{error}; the first value to differ is {place}" if place else str(error)) from error
    if torch.cuda.is_available():  # which is where the pipeline would run torch
        trajectory = _trajectory(load_model(directory, torch.device("cuda")), card, steps)
        on_cuda = _torch_engines(trajectory, states, model.sample_shape, torch.device("cuda"))
        reference = _at_its_guidance(on_cuda, card)
    times = _measure({"engine": engines, "torch": reference}, encoder.tokenize)
    return replace(manifest, milliseconds=times, parity=asdict(parity))


def _trajectory(model: Model, card: Card, steps: int) -> Trajectory:
    return Trajectory(model, get_sampler(card.sampler), card.times[str(steps)])


def _torch_engines(
    trajectory: Trajectory, states: TextStates, shape: tuple[int, int, int], device: torch.device = CPU
) -> Engines:
    text_encoder = TorchEngine(states, CPU, output=CONDITION[0])
    return Engines("torch", TorchEngine(trajectory, device), text_encoder, trajectory.draws, shape)


@dataclass(frozen=True)
class _AtGuidance:
    """A trajectory that takes the guidance scale, given always the same one."""

    engine: Engine
    scale: float

    def __call__(self, **arrays: npt.NDArray[Any]) -> Arrays:
        return self.engine(**arrays, guidance=np.full(len(arrays["noise"]), self.scale, np.float32))


def _at_its_guidance(engines: Engines, card: Card) -> Engines:
    if card.guidance_range is None:
        return engines
    return replace(engines, trajectory=_AtGuidance(engines.trajectory, card.guidance))


def _first_difference(graphs: Mapping[str, Graph], folder: Path, target: str, precision: str) -> str | None:
    """Where the first of the graphs that the target gets wrong goes wrong."""

    def run(graph: Graph, model: Any) -> Arrays:
        TARGETS[target].write(model, folder, "probe", precision)
        engine = engine_module(target).load(folder, "probe", precision)
        return engine(**{name: value.numpy() for name, value in graph.example.items()})

    places = (first_difference(graph, partial(run, graph), precision) for graph in graphs.values())
    return next(filter(None, places), None)


def _measure(contenders: Mapping[str, Engines], tokenize: Tokenizer) -> dict[str, float]:
    """Median milliseconds of one image from token ids to pixels, in turns: what else runs then slows all alike."""
    tokens, noise = make_inputs(tokenize, contenders["torch"], PROMPTS[:1], [0])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(WARM_UP_RUNS + TIMED_RUNS):
        for name, engines in contenders.items():
            start = time.perf_counter()
            engines(tokens, noise)
            seconds[name].append(time.perf_counter() - start)
    return {name: round(1000 * median(values[WARM_UP_RUNS:]), 3) for name, values in seconds.items()}
