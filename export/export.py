"""`fewstep export`: a student and a step count become an engine, checked and measured before it is kept."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..runtime.artefact import has_text_encoders
from ..runtime.engines import Engine, Engines, engine_module
from ..runtime.engines.auto import take_turns
from ..runtime.engines.device import this_device
from ..runtime.engines.manifest import (
    FORMAT,
    KERNELS,
    Manifest,
    State,
    files_in,
    kernel_versions,
    kind_of,
    read_manifest,
    refusal,
    write_manifest,
)
from ..runtime.engines.store import beyond, engines_bound, exclusive, list_engines, remove_engine
from ..runtime.errors import FewstepError, require
from ..runtime.files import atomic_path, read_json, sha256_of, write_json
from ..runtime.wording import either
from . import aoti, nodes, onnx, openvino, plugins, tensorrt
from .calibration import record
from .differences import END_TO_END
from .gate import REPORT, Gate
from .graph import Graph
from .large import digest
from .parity import ParityReport, Score, Trial, with_quality
from .parts import PartsSource
from .source import Source

SHAPES = ("fused", "parts")
NODES = ("onnx", "fp32")
"""The only target and precision whose graphs are written as they are, nodes and functions included."""


@dataclass(frozen=True)
class Target:
    """A file format that graphs are exported to, and the engine of that name loads.

    Args:
        precisions: gives what it can be built in on this machine, the default first.
        write: `write(graph, folder, name, precision)` writes one graph; gives what it kept in higher precision, by
            rule, if it has such rules.
        require: raises `FewstepError` if a library is missing that only writing a precision needs.
    """

    precisions: Callable[[], tuple[str, ...]]
    write: Callable[[Graph, Path, str, str], Mapping[str, Any] | None]
    require: Callable[[str], object] = lambda precision: None


TARGETS: dict[str, Target] = {
    "onnx": Target(onnx.precisions, onnx.write),
    "openvino": Target(openvino.precisions, openvino.write, openvino.require_library),
    "tensorrt": Target(tensorrt.precisions, tensorrt.write),
    "aoti": Target(aoti.precisions, aoti.write),
}
"""Every target by name; a new one is a file here, a file in `runtime/engines` and a line in each table."""


@dataclass(frozen=True)
class Request:
    """A target that this machine can build, as `check_request` found.

    Args:
        target: a key of `TARGETS`.
        precision: one of the target's.
        library: the engine's library, its version and what it runs on.
        built: folder of a tensorrt engine that is given other weights, and not built anew.
    """

    target: str
    precision: str
    library: str
    built: Path | None = None


class Exportable(Protocol):
    """A model in one shape of export; `Source` and `PartsSource` say more."""

    directory: Path
    key: str
    kernels: bool

    @property
    def steps(self) -> int | None:
        """Network evaluations; None where all step counts are served."""
        ...

    @property
    def graphs(self) -> Mapping[str, Graph]:
        """What the target is given, by name."""
        ...

    def require_target(self, target: str) -> None:
        """Raise `FewstepError` for a target that does not take this shape."""
        ...

    def place(self, folder: Path, name: str, target: str) -> tuple[Path, str]:
        """Where the file of a graph goes, and its name without the suffix."""
        ...

    def furnish(self, folder: Path) -> None:
        """Write what goes beside the graphs."""
        ...

    def open(self, folder: Path, manifest: Manifest) -> Any:
        """What was written."""
        ...

    def compare(self, opened: Any, precision: str, score: Score | None) -> tuple[ParityReport, Trial]:
        """Compare it with torch in float32; see `parity.judge`."""
        ...

    def rivals(self, opened: Any) -> tuple[Engines, Engines]:
        """What draws the same for a score: torch in float32, and what was opened."""
        ...

    def calls(self, opened: Any) -> Mapping[str, Callable[[], object]]:
        """One image to be measured, drawn by the `engine` and by `torch`."""
        ...


@dataclass(frozen=True)
class ExportReport:
    """What an export made or found.

    Args:
        folder: the engine's.
        manifest: what it holds, times included.
        reused: whether it was there already, and still held.
    """

    folder: Path
    manifest: Manifest
    reused: bool

    def __str__(self) -> str:
        times, report = self.manifest.milliseconds, read_json(self.folder / self.manifest.report)
        worst = report["worst"][END_TO_END]
        state = "is up to date" if self.reused else "is written"
        score = ""
        if quality := self.manifest.quality:
            score = f"; its score is {quality['engine']:.3f} where torch's is {quality['torch']:.3f}"
        return (
            f"{self.folder} {state}: {times['engine']:.1f} ms an image where torch takes {times['torch']:.1f} ms; "
            f"its images are torch's to a PSNR of {worst['psnr']:.1f} dB and an SSIM of {worst['ssim']:.4f} at worst"
            + score
        )


def export_student(
    directory: Path, target: str, steps: int | None = None, precision: str | None = None
) -> ExportReport:
    """Export a student to one target; see `check_request`, `Source` and `export_source`, for several."""
    return export_source(Source(directory, steps), check_request(target, precision))


def open_source(
    directory: Path, shape: str | None = None, steps: int | None = None, kernels: bool = False
) -> Exportable:
    """What is exported of a model.

    Args:
        directory: the model's.
        shape: `fused`, a whole trajectory as one graph, or `parts`; None takes parts for what has text encoders of its
            own.
        steps: of a trajectory; parts serve every step count.
        kernels: keep our kernels as nodes of the graphs; see `nodes`.

    Raises:
        FewstepError: the model cannot be exported in this shape.
    """
    if shape is None:
        shape = "parts" if has_text_encoders(directory) else "fused"
    if shape not in SHAPES:
        raise FewstepError(f"unknown shape {shape!r}: choose {either(SHAPES)}")
    if shape == "fused":
        return Source(directory, steps, kernels)
    if steps is not None:
        raise FewstepError("an export in parts serves every step count: leave --steps out")
    return PartsSource(directory, kernels)


def check_request(target: str, precision: str | None = None) -> Request:
    """Find out whether this machine can build a target.

    Args:
        target: a key of `TARGETS`.
        precision: None takes the target's fastest on this machine.

    Raises:
        FewstepError: an unknown target or precision, or the engine's library is missing.
    """
    if target not in TARGETS:
        raise FewstepError(f"unknown export target {target!r}: choose {either(TARGETS)}")
    library = engine_module(target).library()
    possible = TARGETS[target].precisions()
    if precision is not None and precision not in possible:
        raise FewstepError(f"{target} has no precision {precision!r} on this machine: choose {either(possible)}")
    return Request(target, precision or possible[0], library)


def export_source(source: Exportable, request: Request, score: Score | None = None) -> ExportReport:
    """Export a model as an engine beside it, `DIR/engines/<target>-<precision>-<steps>step-<key>/` or `-parts-<key>/`.

    The engine appears whole, after its images agreed with torch's, or not at all. One that is there and still holds is
    kept as it is; if it was never scored and now can be, it is, and goes if its score falls. One process at a time
    builds beside a student; another waits, and takes what it then finds. What has become useless of the same kind goes,
    and the longest unused beyond `engines_bound()`. With kernels as nodes an engine is of another kind than without.

    Args:
        source: the model.
        request: what for.
        score: of its drawings, which must not fall either; see `parity.Score`.

    Raises:
        FewstepError: a library is missing, the model cannot be exported, or the engine did not pass the gate, which
            left its report in `DIR/refused/`, in a folder of the same name without the key.
    """
    source.require_target(request.target)
    if source.kernels:
        _require_kernels(request)
    bound = engines_bound()
    found = _find(source, request)
    if found and not _lacks(found, score):
        return found
    for library in ("onnx", "onnxscript", "torchmetrics"):
        require(library, request.target)
    TARGETS[request.target].require(request.precision)
    with exclusive(source.directory):
        found = _find(source, request)
        if found:
            return _scored(source, request, found, score) if score and _lacks(found, score) else found
        made = _build(source, request, score)
        _tidy(made, bound)
    return made


def _require_kernels(request: Request) -> None:
    """Refuse what cannot hold our kernels."""
    if request.target == "tensorrt" and request.precision in plugins.PRECISIONS:
        plugins.require_plugins()
    elif (request.target, request.precision) != NODES:
        others = f"tensorrt in {either(plugins.PRECISIONS)}"
        raise FewstepError(f"only {' in '.join(NODES)} and {others} hold kernels as nodes: leave --kernels out")


def _find(source: Exportable, request: Request) -> ExportReport | None:
    """The engine that is there already, if it holds."""
    for folder in sorted((source.directory / "engines").glob(f"{_kind(source, request)}-*")):
        try:
            manifest = read_manifest(folder)
        except FewstepError:
            continue
        if not refusal(folder, manifest, source.key, request.library):
            return ExportReport(folder, manifest, reused=True)
    return None


def _lacks(found: ExportReport, score: Score | None) -> bool:
    """Whether an engine was never scored, and now can be."""
    return score is not None and not found.manifest.quality


def _scored(source: Exportable, request: Request, found: ExportReport, score: Score) -> ExportReport:
    """An engine that passed the gate without a score, with one in its manifest; what does not pass with it goes."""
    opened = source.open(found.folder, found.manifest)
    passed = ParityReport(**read_json(found.folder / found.manifest.report))
    try:
        report = _gate(source, request, {}).judge(with_quality(passed, *map(score, source.rivals(opened))))
    except FewstepError:
        remove_engine(found.folder)
        raise
    manifest = replace(found.manifest, quality=_quality(report))
    write_manifest(found.folder, manifest)
    return replace(found, manifest=manifest)


def _tidy(made: ExportReport, bound: float) -> None:
    """Remove what the engine just made replaces on this machine, and the longest unused beyond the bound."""
    engines = list_engines(made.folder.parent.parent)
    kind = made.folder.name.rpartition("-")[0]
    others = [engine for engine in engines if engine.folder != made.folder]
    replaced = [engine for engine in others if engine.kind == kind and engine.state is not State.ELSEWHERE]
    unused = beyond([engine for engine in engines if engine not in replaced], bound)
    for engine in (*replaced, *unused):
        if engine.folder != made.folder:
            remove_engine(engine.folder)


def _build(source: Exportable, request: Request, score: Score | None) -> ExportReport:
    """Write the graphs, and keep them once it is known what they draw and how fast."""
    target, precision = request.target, request.precision
    draft = Manifest(
        format=FORMAT,
        target=target,
        precision=precision,
        steps=source.steps,
        built_from=source.key,
        graphs={name: digest(graph.model) for name, graph in source.graphs.items()},
        shapes={name: _shapes(graph) for name, graph in source.graphs.items()},
        nodes={name: found for name, graph in source.graphs.items() if (found := nodes.calls(graph.model))},
        sensitive={},
        kernels=kernel_versions(),
        library=request.library,
        device=this_device(),
        files={},
        milliseconds={},
        report=REPORT,
        calibration=record(precision),
    )
    folder, gate = source.directory / "engines" / draft.folder_name, _gate(source, request, source.graphs)
    try:
        with atomic_path(folder) as staging:
            staging.mkdir()
            with gate.building():
                kept = {name: _write(source, request, name, staging) for name in source.graphs}
                source.furnish(staging)
                opened = source.open(staging, draft)
            report = gate.judge(*source.compare(opened, precision, score))
            write_json(staging / REPORT, asdict(report))
            manifest = replace(
                draft,
                sensitive={name: rules for name, rules in kept.items() if rules},
                files={name: sha256_of(path) for name, path in files_in(staging).items()},
                milliseconds=take_turns(source.calls(opened)),
                quality=_quality(report),
            )
            write_manifest(staging, manifest)
    finally:
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    return ExportReport(folder, manifest, reused=False)


def _write(source: Exportable, request: Request, name: str, folder: Path) -> Mapping[str, Any] | None:
    place, file = source.place(folder, name, request.target)
    place.mkdir(exist_ok=True)
    if request.built:
        return tensorrt.refit(request.built, source.graphs[name], place, file, request.precision)
    return TARGETS[request.target].write(source.graphs[name], place, file, request.precision)


def _quality(report: ParityReport) -> dict[str, float]:
    return asdict(report.quality) if report.quality else {}


def _gate(source: Exportable, request: Request, graphs: Mapping[str, Graph]) -> Gate:
    def build(graph: Graph, folder: Path) -> Engine:
        TARGETS[request.target].write(graph, folder, "probe", request.precision)
        return engine_module(request.target).load(folder, "probe", request.precision)

    return Gate(
        target=request.target,
        precision=request.precision,
        graphs=graphs,
        build=build,
        refused=source.directory / "refused" / _kind(source, request),
    )


def _kind(source: Exportable, request: Request) -> str:
    return kind_of(request.target, f"{request.precision}{KERNELS if source.kernels else ''}", source.steps)


def _shapes(graph: Graph) -> dict[str, list[int | str]]:
    """Of inputs and outputs; what is no number is dynamic."""
    values = (*graph.model.graph.input, *graph.model.graph.output)
    return {value.name: [_size(size) for size in value.type.tensor_type.shape.dim] for value in values}


def _size(dimension: Any) -> int | str:
    size: int | str = dimension.dim_value or dimension.dim_param or "batch"
    return size
