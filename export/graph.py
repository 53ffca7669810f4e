"""Modules as ONNX graphs: a student's whole trajectory with its decoder, and its text encoder; or a model's parts."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.denoiser import Condition
from ..runtime.engines import PIXELS, Arrays
from ..runtime.errors import require
from ..runtime.noise import trajectory_noise
from ..runtime.text import CONDITION, TextEncoder
from ..runtime.trajectory import Pixels, Trajectory
from .fold import drop_unused, fold_constants
from .nodes import Functions

OPSET = 20
"""The first with `Gelu` as one operator; both ONNX Runtime and OpenVINO have kernels for all of it."""

BATCH = torch.export.Dim("batch", min=1, max=1024)
"""The first dimension of every input and output."""
FEW = torch.export.Dim("batch", min=1, max=63)
"""The same of a part: from 64 on diffusers lays memory out otherwise, of which the graph knows nothing."""


@dataclass(frozen=True)
class Graph:
    """A module as ONNX, or a part of one.

    Args:
        model: the `onnx.ModelProto`.
        program: the torch program that the whole was translated from; their values have the same names.
        example: inputs of the whole, by the names of the ONNX inputs, in the order of the program's.
        samples: makes inputs of many single images, by which activations are scaled; none if there is no need.
    """

    model: Any
    program: torch.export.ExportedProgram
    example: Mapping[str, Tensor]
    samples: Callable[[], Sequence[Arrays]] = list

    @property
    def inputs(self) -> list[str]:
        """Names of what the model takes."""
        return [value.name for value in self.model.graph.input]

    @property
    def outputs(self) -> list[str]:
        """Names of what the model gives."""
        return [value.name for value in self.model.graph.output]


class TextStates(nn.Module):
    """The text encoder as a plain module of tensors."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask, each (B, L), to token states (B, L, D)."""
        # The encoder takes type 0 by default, but would gather it from a table by operators that do not fold.
        types = torch.zeros_like(input_ids)
        states: Tensor = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=types
        ).last_hidden_state
        return states


def trajectory_graph(trajectory: Trajectory, sample_shape: tuple[int, int, int], condition: Condition) -> Graph:
    """The graph from `noise` and the condition's tensors, under their own names, to `pixels`.

    Args:
        trajectory: on the CPU, for inference.
        sample_shape: (C, h, w) of a latent.
        condition: an example of two prompts or more.
    """
    noise = trajectory_noise(range(len(next(iter(condition.values())))), trajectory.draws, sample_shape)
    return _folded(_to_onnx(Pixels(trajectory), {"noise": torch.from_numpy(noise), **condition}, [PIXELS]))


def text_encoder_graph(states: TextStates, tokens: Mapping[str, Tensor]) -> Graph:
    """The graph from `input_ids` and `attention_mask` to `encoder_hidden_states`.

    Args:
        states: on the CPU, for inference.
        tokens: an example of two prompts or more.
    """
    return _folded(_to_onnx(states, tokens, [CONDITION[0]]))


def part_graph(
    module: nn.Module, example: Mapping[str, Tensor], outputs: Sequence[str], sizes: Mapping[str, Sequence[str]]
) -> Graph:
    """The graph of one module.

    Args:
        module: on the CPU, for inference; takes tensors by name, gives one or a tuple.
        example: what it takes, of a batch of two or more; one without dimensions is the whole batch's.
        outputs: names of what it gives.
        sizes: names of an input's dimensions after the batch, or empty where they are fixed. They stay dynamic as far
            as the module allows.
    """
    graph = _to_onnx(module, example, outputs, sizes)
    drop_unused(graph.model.graph)
    _name_sizes(graph.model.graph, sizes)
    return graph


class _OneBatch(nn.Module):
    """Calls a module by the names of its inputs, and tells the exporter that all have one batch size.

    It would otherwise give each a symbol of its own.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        for other in inputs[1:]:
            if other.ndim:
                torch._check(inputs[0].shape[0] == other.shape[0])  # type: ignore[no-untyped-call]
        output: Tensor | tuple[Tensor, ...] = self.module(**dict(zip(self.names, inputs, strict=True)))
        return output


def _to_onnx(
    module: nn.Module,
    example: Mapping[str, Tensor],
    outputs: Sequence[str],
    sizes: Mapping[str, Sequence[str]] | None = None,
) -> Graph:
    for library in ("onnx", "onnxscript"):
        require(library, "onnx")
    shared = {0: BATCH} if sizes is None else {0: FEW}
    dynamic = tuple(_dynamic(value, shared, (sizes or {}).get(name, ())) for name, value in example.items())
    functions = Functions()
    program = _export(_OneBatch(module, list(example)), example, outputs, (dynamic,), functions)
    assert program.exported_program is not None
    model = program.model_proto
    functions.add_to(model, lambda *arguments: _export(*arguments).model_proto)
    return Graph(model, program.exported_program, example)


def _export(
    module: nn.Module,
    example: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Any,
    functions: Functions | None = None,
) -> torch.onnx.ONNXProgram:
    with quiet(), torch.inference_mode():
        program = torch.onnx.export(
            module.eval(),
            tuple(example.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=list(outputs),
            dynamic_shapes=dynamic,
            custom_translation_table=functions.translations if functions else None,
            verbose=False,
            optimize=False,
        )
        assert program is not None
        _simplify(program.model)
    return program


def _dynamic(value: Tensor, shared: Mapping[int, Any], names: Sequence[str]) -> dict[int, Any]:
    """Which dimensions of an input are dynamic."""
    others = {place: torch.export.Dim.AUTO for place, name in enumerate(names, start=1) if name}
    return {**shared, **others} if value.ndim else {}


def _folded(graph: Graph) -> Graph:
    return replace(graph, model=fold_constants(graph.model))


def _name_sizes(graph: Any, sizes: Mapping[str, Sequence[str]]) -> None:
    """Call the dynamic sizes what they are, where the exporter numbers them."""
    known: dict[str, str] = {}
    for value in graph.input:
        for name, size in zip(("batch", *sizes.get(value.name, ())), value.type.tensor_type.shape.dim, strict=False):
            if size.dim_param and name:
                known.setdefault(size.dim_param, name)
    for value in (*graph.input, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda word: known.get(word[0], word[0]), size.dim_param)


def _simplify(model: Any) -> None:
    """The exporter's own optimisation without its rewriting rules.

    Those take any constant below 1e-8 for zero and remove its addition; without the 1e-15 in its normaliser, Sana's
    linear attention divides 0 by 0. They also take two fifths of the exporter's time, and gain the engines nothing.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript.optimizer import fold_constants_ir

    common.InlinePass()(model)
    for _ in range(2):
        fold_constants_ir(model, onnx_shape_inference=True)
    tidy = Sequential(
        common.RemoveUnusedNodesPass(),
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    )
    tidy(model)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's notes on torchvision, on its own deprecations and on foldings it does not try."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
