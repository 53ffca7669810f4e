"""Our kernels as nodes of an ONNX graph: calls of functions in the domain `fewstep`, whose bodies are the references.

Who does not know them takes the bodies; a plugin or a custom operator of the same name takes the node whole, whose
attributes say all that the kernel is given. Such nodes are in what is traced within `keeping`.

Each variant of a call is a function of its own name, `group_norm_silu_2`, that takes the given tensors alone: the
parser of TensorRT takes overloads of one name for the same function, and refuses a call that leaves inputs out.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import apply, operators, remove
from ..kernels.dispatch import fused_everywhere
from ..runtime.errors import FewstepError

DOMAIN = "fewstep"
ROWS = {"adaptive_norm", "gated_residual", "gated_residual_norm"}
"""Operators on rows of tokens."""
VECTORS = {"gate", "scale", "shift"}
"""What all rows of a sample share, and all samples may."""
Export = Callable[[nn.Module, Mapping[str, Tensor], Sequence[str], Any], Any]
"""`export(module, example, outputs, dynamic_shapes)` gives the `onnx.ModelProto` of a module, simplified."""


@dataclass(frozen=True)
class Variant:
    """What one body holds for: how an operator is called.

    Args:
        operator: its name.
        given: sizes of each tensor that is given, by its parameter; None for those that are dynamic.
        constants: the values of all other parameters.
    """

    operator: str
    given: tuple[tuple[str, tuple[int | None, ...]], ...]
    constants: tuple[tuple[str, Any], ...]


class Functions:
    """The functions that a graph calls, found while torch's exporter translates it."""

    def __init__(self) -> None:
        self._examples: dict[Variant, dict[str, Tensor]] = {}

    @property
    def translations(self) -> dict[Any, Callable[..., Any]]:
        """What `torch.onnx.export` takes as `custom_translation_table`."""
        return {operator: partial(self._call, operator) for operator in _operators()}

    def add_to(self, model: Any, export: Export) -> None:
        """Give an `onnx.ModelProto` the functions that its nodes call."""
        for variant, example in self._examples.items():
            model.functions.append(_function(variant, self._name(variant), example, export))

    def _call(self, operator: Any, *values: Any, **options: Any) -> Any:
        """Make the node of a call."""
        from onnxscript import evaluator

        given, constants = _arguments(operator, values, options)
        sizes = {name: tuple(_size(size) for size in value.shape) for name, value in given.items()}
        name = operator._schema.name.removeprefix(f"{DOMAIN}::")
        variant = Variant(name, tuple(sizes.items()), tuple(constants.items()))
        self._examples.setdefault(variant, _example(given))
        attributes = {key: int(value) if isinstance(value, bool) else value for key, value in constants.items()}
        schema = _schema(self._name(variant), given, attributes, len(operator._schema.returns))
        return evaluator.default().eval(schema, list(given.values()), attributes)

    def _name(self, variant: Variant) -> str:
        alike = [other for other in self._examples if other.operator == variant.operator]
        return f"{variant.operator}_{alike.index(variant) + 1}"


@contextmanager
def keeping(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Trace the kernels of networks as operators for as long as this lasts; with no network, of none.

    Raises:
        FewstepError: they have no kernels.
    """
    modules = list(networks)
    if not modules:
        yield
        return
    try:
        if not sum(sum(apply(module).values()) for module in modules):
            raise FewstepError("no layer of this model has a kernel: leave --kernels out")
        with fused_everywhere():
            yield
    finally:
        for module in modules:
            remove(module)


def calls(model: Any) -> dict[str, int]:
    """How many nodes each of our kernels has in an `onnx.ModelProto`, by its name."""
    names = (node.op_type.rpartition("_")[0] for node in model.graph.node if node.domain == DOMAIN)
    return dict(sorted(Counter(names).items()))


def spreading(model: Any) -> set[tuple[str, int]]:
    """Which inputs of our kernels' nodes may be given once for a whole batch: name of the node's type, and place."""
    return {
        (function.name, place)
        for function in model.functions
        for place, parameter in enumerate(function.input)
        if function.name.rpartition("_")[0] in ROWS and parameter in VECTORS
    }


def inlined(model: Any) -> Any:
    """The same `onnx.ModelProto` without functions, for who does not know them."""
    from onnx import inliner

    return inliner.inline_local_functions(model) if model.functions else model


def _operators() -> Iterator[Any]:
    for name, function in vars(operators).items():
        if inspect.isfunction(function) and hasattr(function, "__wrapped__"):
            yield getattr(torch.ops.fewstep, name).default


def _arguments(
    operator: Any, values: Sequence[Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors that a call is given, and all its other arguments, by parameter; what is left out has its default."""
    names = (parameter.name for parameter in operator._schema.arguments)
    found = {**dict(zip(names, values, strict=False)), **options}
    given, constants = {}, {}
    for parameter in operator._schema.arguments:
        value = found.get(parameter.name, parameter.default_value)
        if "Tensor" not in str(parameter.type):
            constants[parameter.name] = value
        elif value is not None:
            given[parameter.name] = value
    return given, constants


def _size(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _example(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of sizes that agree where those of the values do; they are traced, and their numbers never read."""
    symbols = dict.fromkeys(str(size) for value in given.values() for size in value.shape if _size(size) is None)
    sizes = {symbol: number for number, symbol in enumerate(symbols, start=3)}
    return {
        name: torch.empty([_size(size) or sizes[str(size)] for size in value.shape]) for name, value in given.items()
    }


def _schema(name: str, given: Iterable[str], attributes: Mapping[str, Any], outputs: int) -> Any:
    """A function as ONNX declares its own operators."""
    from onnx.defs import OpSchema

    kinds = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT, str: OpSchema.AttrType.STRING}
    return OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(parameter, "T") for parameter in given],
        outputs=[OpSchema.FormalParameter(f"y_{place}", "T") for place in range(outputs)],
        type_constraints=[("T", ["tensor(float)"], "What graphs are traced in.")],
        attributes=[OpSchema.Attribute(key, kinds[type(value)], "") for key, value in attributes.items()],
    )


class _Operation(nn.Module):
    """The operation that an operator stands for, which on a CPU is the reference."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.function: Callable[..., Any] = inspect.unwrap(getattr(operators, variant.operator))
        parameters = inspect.signature(self.function).parameters
        self.names = [name for name, _ in variant.given]
        self.constants = dict.fromkeys(parameters) | dict(variant.constants)

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(**self.constants | dict(zip(self.names, tensors, strict=True)))


def _function(variant: Variant, name: str, example: Mapping[str, Tensor], export: Export) -> Any:
    """The `onnx.FunctionProto` of a variant."""
    from onnx import TensorProto, helper

    returns = getattr(torch.ops.fewstep, variant.operator).default._schema.returns
    outputs = [f"y_{place}" for place in range(len(returns))]
    dynamic = tuple(
        {place: torch.export.Dim.AUTO for place, size in enumerate(sizes) if size is None} for _, sizes in variant.given
    )
    body = export(_Operation(variant), example, outputs, (dynamic,))
    constants = [helper.make_node("Constant", [], [each.name], value=each) for each in body.graph.initializer]
    nodes = [*constants, *body.graph.node]
    opset = [entry for entry in body.opset_import if not entry.domain]
    attributes = [parameter for parameter, _ in variant.constants]
    # ONNX gives functions no sizes of their inputs; who takes a node whole wants them.
    known = [helper.make_tensor_value_info(each, TensorProto.FLOAT, sizes) for each, sizes in variant.given]
    return helper.make_function(DOMAIN, name, list(example), outputs, nodes, opset, attributes, value_info=known)
