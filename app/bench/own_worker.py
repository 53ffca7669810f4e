"""The process of one engine of ours: what `worker.OURS` starts."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.artefact import read_card
from ...runtime.errors import FewstepError
from .peer_worker import Draw, Job, serve

if TYPE_CHECKING:
    from torch import nn

HALF = "torch-bf16"
BARE = "bare "
"""Before an engine's name: its trajectory alone, called with the same inputs again and again."""


def _open(job: Job) -> Draw:
    directory, name = Path(job["model"]), job["engine"]
    if name.startswith(BARE):
        return _bare(directory, name.removeprefix(BARE))
    from ...runtime.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(directory, "torch" if name == HALF else name)
    if name == HALF:
        for part in (pipeline.model.network, pipeline.model.decoder):
            _halve(part)
    return lambda prompts: pipeline.generate(prompts, seed=range(len(prompts)), batch_size=len(prompts)).arrays


def _halve(part: "nn.Module") -> None:
    """Compute a part in bf16 as diffusers does: weights and inputs cast, the result in float32 again.

    Autocast would also cast what a network computes in float32 on purpose, such as the normaliser of linear attention.
    """
    import torch

    from ...runtime.quiet import quiet

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim < 2:  # times, which have one dimension, stay exact
            return value
        return value.bfloat16() if value.is_floating_point() else value

    def enter(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(cast, arguments)), {name: cast(value) for name, value in named.items()}

    def leave(_: Any, arguments: tuple[Any, ...], result: Any) -> Any:
        return tuple(value.float() for value in result) if isinstance(result, tuple) else result.float()

    with quiet("diffusers"):  # it warns that it keeps some modules in float32, even where there is none
        part.to(torch.bfloat16)
    part.register_forward_pre_hook(enter, with_kwargs=True)
    part.register_forward_hook(leave)


def _bare(directory: Path, name: str) -> Draw:
    """OpenVINO's `infer()` on an exported trajectory, compiled for each batch size, with inputs made once."""
    import openvino
    import torch

    from ...runtime.engines import PIXELS, TRAJECTORY, find_exports, open_export
    from ...runtime.engines.openvino import SUFFIX, properties
    from ...runtime.noise import trajectory_noise
    from ...runtime.prompt_cache import engine_prompts

    card = read_card(directory)
    steps = card.steps[0]
    usable, _ = find_exports(directory, name, steps, card.engine_key(steps))
    if not usable:
        raise FewstepError(f"{name} was not exported")
    folder, manifest = usable[0]
    engines = open_export(usable[0])
    encode, core, ready = engine_prompts(engines), openvino.Core(), dict[int, Callable[[], Any]]()
    told = properties(manifest.precision, torch.get_num_threads())

    def prepare(prompts: list[str]) -> Callable[[], Any]:
        model = core.read_model(folder / f"{TRAJECTORY}{SUFFIX}")
        model.reshape({value.any_name: [len(prompts), *list(value.partial_shape)[1:]] for value in model.inputs})
        request = core.compile_model(model, "CPU", told).create_infer_request()
        inputs = {
            **encode(prompts),
            "noise": trajectory_noise(range(len(prompts)), engines.draws, engines.sample_shape),
        }
        position = [value.any_name for value in model.outputs].index(PIXELS)
        return lambda: request.infer(inputs, share_inputs=True)[position]

    def draw(prompts: list[str]) -> Any:
        batch = len(prompts)
        if batch not in ready:
            ready[batch] = prepare(prompts)
        return ready[batch]()

    return draw


def _export(job: Job) -> None:
    from ...export.export import check_request, export_source, open_source

    target, _, precision = job["engine"].partition("-")
    export_source(open_source(Path(job["model"])), check_request(target, precision))


if __name__ == "__main__":
    serve(_open, _export)
