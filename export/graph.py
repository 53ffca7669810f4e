"""A student as ONNX graphs: the whole trajectory with its decoder, and the text encoder. Only the batch is dynamic."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.denoiser import Condition
from ..runtime.engines import PIXELS
from ..runtime.errors import require
from ..runtime.noise import trajectory_noise
from ..runtime.text import CONDITION, TextEncoder
from ..runtime.trajectory import Pixels, Trajectory
from .fold import fold_constants

OPSET = 20
"""The first with `Gelu` as one operator; both ONNX Runtime and OpenVINO have kernels for all of it."""


@dataclass(frozen=True)
class Graph:
    """A module as ONNX.

    Args:
        model: the `onnx.ModelProto`.
        program: the torch program that it was translated from; their values have the same names.
        example: inputs of both, by the names of the ONNX inputs, in the order of the program's.
    """

    model: Any
    program: torch.export.ExportedProgram
    example: Mapping[str, Tensor]


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
    return _to_onnx(Pixels(trajectory), {"noise": torch.from_numpy(noise), **condition}, PIXELS)


def text_encoder_graph(states: TextStates, tokens: Mapping[str, Tensor]) -> Graph:
    """The graph from `input_ids` and `attention_mask` to `encoder_hidden_states`.

    Args:
        states: on the CPU, for inference.
        tokens: an example of two prompts or more.
    """
    return _to_onnx(states, tokens, CONDITION[0])


class _OneBatch(nn.Module):
    """Calls a module by the names of its inputs, and tells the exporter that all have one batch size.

    It would otherwise give each a symbol of its own.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        for other in inputs[1:]:
            torch._check(inputs[0].shape[0] == other.shape[0])  # type: ignore[no-untyped-call]
        output: Tensor = self.module(**dict(zip(self.names, inputs, strict=True)))
        return output


def _to_onnx(module: nn.Module, example: Mapping[str, Tensor], output: str) -> Graph:
    for library in ("onnx", "onnxscript"):
        require(library, "onnx")
    batch = torch.export.Dim("batch", min=1, max=1024)
    with _quiet(), torch.inference_mode():
        program = torch.onnx.export(
            _OneBatch(module, list(example)).eval(),
            tuple(example.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=[output],
            dynamic_shapes=(({0: batch},) * len(example),),
            verbose=False,
            optimize=False,
        )
        assert program is not None
        assert program.exported_program is not None
        _simplify(program.model)
    return Graph(fold_constants(program.model_proto), program.exported_program, example)


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
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on torchvision, on its own deprecations and on foldings it does not try."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
