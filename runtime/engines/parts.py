"""Exports in parts: modules of diffusers and transformers that engines compute, and that are called as these are."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Model, load_model
from ..files import read_json
from ..text import TextEncoder, load_tokenizer
from . import TEXT_ENCODER, Engine, Found, check_and_touch, engine_module
from .manifest import Manifest

AUTOENCODER, DECODER = "vae", "vae_decoder"
"""Folder of the autoencoder in a model, and of its decoder in an export."""
LATENTS, IMAGES = "latent_sample", "sample"
"""What the decoder takes and gives."""
CPU = torch.device("cpu")
_FILES = {"openvino": "openvino_model"}

Shapes = Mapping[str, Sequence[int | str]]
"""Of the inputs and outputs of a part, by name."""


def part_file(target: str) -> str:
    """Name of the graph in every part's folder, without its suffix, as Hugging Face optimum has it."""
    return _FILES.get(target, "model")


@dataclass(frozen=True)
class Parts:
    """The engines of an export, each loaded when first needed.

    Args:
        folder: the export's.
        manifest: its manifest.
    """

    folder: Path
    manifest: Manifest
    _loaded: dict[str, Engine] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Engine:
        """The engine of one part."""
        if name not in self._loaded:
            target, precision = self.manifest.target, self.manifest.precision
            self._loaded[name] = engine_module(target).load(self.folder / name, part_file(target), precision)
        return self._loaded[name]


def open_parts(directory: Path, found: Found) -> Model:
    """The networks of a model as an export computes them, every byte of it as it was written.

    Raises:
        FewstepError: a file changed, or the library refuses it.
    """
    check_and_touch(found)
    return model_of(directory, Parts(*found))


def model_of(directory: Path, parts: Parts) -> Model:
    """The networks of a model as an export computes them, which the caller has checked.

    Text encoders are loaded when the model's is; the autoencoder's encoder is not exported.
    """
    shapes = parts.manifest.shapes

    def load(kind: type[nn.Module], place: Path, device: torch.device) -> nn.Module:
        name, config = place.name, module_config(kind, place)
        if name == AUTOENCODER:
            return _Autoencoder(parts[DECODER], shapes[DECODER], config)
        give = _text_output if name.startswith(TEXT_ENCODER) else _tuple
        return EnginePart(parts[name], shapes[name], kind.forward, config, give)

    def load_built_in() -> TextEncoder:
        from transformers import BertModel

        taken = (parts[TEXT_ENCODER], shapes[TEXT_ENCODER])
        network = EnginePart(*taken, BertModel.forward, SimpleNamespace(), _text_output)
        return TextEncoder(load_tokenizer(), network, parts.manifest.graphs[TEXT_ENCODER])

    model = load_model(directory, CPU, load)
    if (directory / TEXT_ENCODER).is_dir():
        return model
    return replace(model, load_text_encoder=load_built_in)


class EnginePart(nn.Module):
    """Takes the place of a module.

    Args:
        engine: computes it.
        shapes: of the engine's inputs and outputs; an input without dimensions is one time for the whole batch.
        forward: the module's, which says how the arguments are called.
        config: the module's.
        give: makes of the outputs what the module returns.
    """

    dtype, device = torch.float32, CPU

    def __init__(
        self,
        engine: Engine,
        shapes: Shapes,
        forward: Callable[..., Any],
        config: Any,
        give: Callable[[dict[str, Tensor]], Any],
    ) -> None:
        super().__init__()
        self.engine, self.shapes, self.config, self.give = engine, shapes, config, give
        self.arguments = partial(named_arguments, inspect.signature(forward), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it as the module: of the arguments, the engine is given those that it takes."""
        return self.give(run_engine(self.engine, self.shapes, self.arguments(*args, **kwargs)))


class _Autoencoder(nn.Module):
    """Takes the place of an autoencoder, of which only the decoder is there."""

    encoder = None

    def __init__(self, engine: Engine, shapes: Shapes, config: Any) -> None:
        super().__init__()
        self.engine, self.shapes, self.config = engine, shapes, config

    def decoder(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 3, H, W), as an `AutoencoderDC` has it."""
        return run_engine(self.engine, self.shapes, {LATENTS: latents})[IMAGES]

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        """The same, as an `AutoencoderKL` has it."""
        return (self.decoder(latents),)


def run_engine(engine: Engine, shapes: Shapes, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run an engine on tensors, without copying where they lie on the CPU; what it does not know is left out.

    Returns:
        The outputs that `shapes` names, in the engine's order.
    """
    arrays = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name in shapes:
            one = value if shapes[name] else value.reshape(-1)[0]  # samplers give all images the same time
            arrays[name] = one.detach().cpu().contiguous().numpy()
    outputs = engine(**arrays)
    return {name: torch.from_numpy(array) for name, array in outputs.items() if name in shapes}


def named_arguments(signature: inspect.Signature, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments of a call by the names of the parameters, those without a name of their own among them."""
    bound = signature.bind(*args, **kwargs).arguments
    flat: dict[str, Any] = {}
    for name, value in bound.items():
        extra = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        flat.update(value if extra else {name: value})
    return flat


def module_config(kind: type[nn.Module], folder: Path) -> SimpleNamespace:
    """What `config.json` says, and the defaults of the class where it says nothing."""
    parameters = inspect.signature(kind).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    return SimpleNamespace(**{**defaults, **read_json(folder / "config.json")})


def _tuple(outputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(outputs.values())


def _text_output(outputs: dict[str, Tensor]) -> Any:
    """As the encoders of transformers give it: by position and by name, the hidden states together."""
    from transformers.utils import ModelOutput

    hidden = {name: value for name, value in outputs.items() if name.startswith("hidden_states.")}
    states = {"hidden_states": tuple(hidden.values())} if hidden else {}
    return ModelOutput(**{name: value for name, value in outputs.items() if name not in hidden}, **states)
