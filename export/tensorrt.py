"""The TensorRT target: the graph in half precision, built into an engine whose weights can be replaced."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..runtime.engines import PRECISIONS
from ..runtime.engines.tensorrt import SUFFIX, cache_file, collect_errors, read_engine, reason, require_gpu, tensorrt
from ..runtime.errors import FewstepError
from ..runtime.files import atomic_path
from ..runtime.pipeline import MAX_BATCH
from .fp8 import quantise
from .graph import Graph
from .plugins import with_plugins
from .precision import to_half

USUAL_BATCH = 1
"""What the engine is fastest for; it takes any from 1 to `MAX_BATCH`, and larger ones in parts."""


def precisions() -> tuple[str, ...]:
    """What this target is built in on this GPU, the default first."""
    capability = torch.cuda.get_device_capability()
    needed = {"bf16": (8, 0), "fp8": (8, 9)}
    return tuple(each for each in PRECISIONS["tensorrt"] if capability >= needed.get(each, (0, 0)))


def write(graph: Graph, folder: Path, name: str, precision: str) -> dict[str, int]:
    """Write the file that the tensorrt engine loads, for this GPU.

    Args:
        graph: what to write.
        folder: where to.
        name: of the file, without its suffix.
        precision: one of `precisions()`.

    Returns:
        How many operators stay in float32, by rule; see `precision.sensitive`.

    Raises:
        FewstepError: TensorRT is missing, or cannot build this graph for this GPU.
    """
    require_gpu()
    model, kept = convert(_taken(graph), precision)
    engine = build(model, _capability(), refittable=True, timings=cache_file("timings"))
    (folder / f"{name}{SUFFIX}").write_bytes(engine)
    return kept


def refit(built: Path, graph: Graph, folder: Path, name: str, precision: str) -> dict[str, int]:
    """As `write`, out of an engine that was written for a graph which differs in its weights alone.

    It takes seconds where building takes minutes: for a student trained on, or with a LoRA merged into it.

    Args:
        built: the folder of that engine.
        graph: one with the new weights.
        folder: where to; may be the same.
        name: of the files, without their suffix.
        precision: that of the engine.

    Raises:
        FewstepError: TensorRT or a GPU is missing, or the graph differs in more than its weights.
    """
    require_gpu()
    library, (logger, errors) = tensorrt(), collect_errors(tensorrt())
    path = built / f"{name}{SUFFIX}"
    engine = read_engine(path, logger, errors)
    refitter = library.Refitter(engine, logger)
    model, kept = convert(_taken(graph), precision)
    taken = library.OnnxParserRefitter(refitter, logger).refit_from_bytes(model.SerializeToString())
    if not (taken and refitter.refit_cuda_engine()):
        raise FewstepError(f"the weights do not fit the engine {path} ({reason(errors)}): export it again")
    with atomic_path(folder / f"{name}{SUFFIX}") as temporary:
        temporary.write_bytes(engine.serialize())
    return kept


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _taken(graph: Graph) -> Graph:
    """The graph with plugins for those of its nodes that are our kernels."""
    return replace(graph, model=with_plugins(graph.model, _capability())) if graph.model.functions else graph


def convert(graph: Graph, precision: str) -> tuple[Any, dict[str, int]]:
    """The `onnx.ModelProto` of a graph in a precision, and how many operators stay above it, by rule.

    In fp8, products take operands of eight bits; all else is in fp16, and what no rule of fp16 may touch in float32.
    """
    from onnx import ModelProto

    if precision == "fp8":
        model, products = quantise(graph.model, graph.samples())
        return model, {**to_half(model, "fp16"), **{f"products: {rule}": count for rule, count in products.items()}}
    model = ModelProto()
    model.CopyFrom(graph.model)
    return model, {} if precision == "fp32" else to_half(model, precision)


def build(model: Any, capability: int, refittable: bool, timings: Path | None = None) -> bytes:
    """Build an engine, which computes every value in the type that the graph gives it.

    TensorRT for RTX needs no GPU for it, unless the engine is to be refittable.

    Args:
        model: an `onnx.ModelProto` with only the batch dynamic, in every input's first dimension.
        capability: the GPU's compute capability, such as 89.
        refittable: whether `refit` can replace its weights.
        timings: file of measured kernels, read and written; TensorRT for RTX measures none when it builds.

    Raises:
        FewstepError: TensorRT is missing, does not know an operator, or does not build for this GPU.
    """
    library, (logger, errors) = tensorrt(), collect_errors(tensorrt())
    builder = library.Builder(logger)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise FewstepError(f"{library.__name__} cannot read the graph ({_parser_error(parser)}): use another target")
    settings = configure(library, builder, network, capability, refittable)
    with _progress(library) as monitor, _timing_cache(library, settings, timings):
        settings.progress_monitor = monitor
        engine = builder.build_serialized_network(network, settings)
    if engine is None:
        raise FewstepError(f"{library.__name__} could not build the engine ({reason(errors)}): use another target")
    return bytes(engine)


def configure(library: Any, builder: Any, network: Any, capability: int, refittable: bool) -> Any:
    """Settings of a build: the GPU, whether weights can be replaced, and which batches are taken."""
    settings = builder.create_builder_config()
    settings.clear_flag(library.BuilderFlag.TF32)  # float32 is for what needs all its digits
    if refittable:
        if not torch.cuda.is_available():
            raise FewstepError(f"{library.__name__} makes engines refittable only where there is an NVIDIA driver")
        settings.set_flag(library.BuilderFlag.REFIT)
    if library.__name__ == "tensorrt_rtx":  # the other builds for the GPU that is there
        settings.num_compute_capabilities = 1
        settings.set_compute_capability(_compute_capability(library, capability), 0)
    profile = builder.create_optimization_profile()
    for position in range(network.num_inputs):
        value = network.get_input(position)
        profile.set_shape(value.name, *((batch, *tuple(value.shape)[1:]) for batch in (1, USUAL_BATCH, MAX_BATCH)))
    settings.add_optimization_profile(profile)
    return settings


def _compute_capability(library: Any, capability: int) -> Any:
    known = {name: each for name, each in library.ComputeCapability.__members__.items() if name.startswith("SM")}
    if f"SM{capability}" not in known:
        numbers = ", ".join(_dotted(int(name.removeprefix("SM"))) for name in known)
        raise FewstepError(
            f"TensorRT for RTX builds for the compute capabilities {numbers}, not for {_dotted(capability)}: "
            "install tensorrt, or use another target"
        )
    return known[f"SM{capability}"]


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def _parser_error(parser: Any) -> str:
    error = parser.get_error(0)
    return f"{error.node_operator()} {error.node_name()}: {error.desc().strip()}"


@contextmanager
def _timing_cache(library: Any, settings: Any, file: Path | None) -> Iterator[None]:
    """Let the build use, and add to, the times of kernels that earlier ones measured on this GPU."""
    if file is None or library.__name__ == "tensorrt_rtx":
        yield
        return
    known = file.read_bytes() if file.is_file() else b""
    settings.set_timing_cache(settings.create_timing_cache(known), ignore_mismatch=False)
    yield
    with atomic_path(file) as temporary:
        temporary.write_bytes(settings.get_timing_cache().serialize())


@contextmanager
def _progress(library: Any) -> Iterator[Any]:
    """A monitor of the build that shows a bar for each of its phases, and ends it when the user interrupts.

    Raises:
        KeyboardInterrupt: later than it came, since no exception may pass through TensorRT.
    """
    from rich.progress import Progress, TaskID

    interrupts: list[KeyboardInterrupt] = []
    tasks: dict[str, TaskID] = {}

    @contextmanager
    def held() -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt as interrupt:
            interrupts.append(interrupt)

    with Progress(transient=True) as bars:

        def phase_start(self: Any, phase: str, parent: str | None, steps: int) -> None:
            with held():
                tasks[phase] = bars.add_task(f"  {phase}" if parent else phase, total=steps)

        def step_complete(self: Any, phase: str, step: int) -> bool:
            with held():
                if phase in tasks:
                    bars.update(tasks[phase], completed=step + 1)
            return not interrupts

        def phase_finish(self: Any, phase: str) -> None:
            with held():
                if phase in tasks:
                    bars.remove_task(tasks.pop(phase))

        methods = {"phase_start": phase_start, "step_complete": step_complete, "phase_finish": phase_finish}
        yield type("Monitor", (library.IProgressMonitor,), methods)()
    if interrupts:
        raise interrupts[0]
