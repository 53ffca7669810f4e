"""Our kernels as plugins of TensorRT, compiled ahead of time: the engine holds their code, and runs without Triton.

Every variant of a call is a plugin of its own name without attributes: what is constant is compiled in.
"""

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import GenericAlias
from typing import TYPE_CHECKING, Any

from ..kernels.dispatch import HAS_TRITON
from ..runtime.engines.tensorrt import tensorrt
from ..runtime.errors import FewstepError, require
from .nodes import DOMAIN, inlined
from .ptx import assemble

if TYPE_CHECKING:
    from ..kernels.plugins_triton import Launch, Shape

PRECISIONS = ("fp16", "bf16", "fp32")
"""That plugins are built in; they compute in float32 in each."""
TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}
"""Triton's words for TensorRT's types."""


@dataclass(frozen=True)
class Plugin:
    """An operation as TensorRT knows it, `fewstep::<name>`.

    Args:
        name: tells it from every other plugin of this process.
        inputs: names of its tensors.
        likes: which input each result is like.
        halved: dimension of which the result has half as many.
        launch: how its kernel runs.
    """

    name: str
    inputs: tuple[str, ...]
    likes: tuple[int, ...]
    halved: int | None
    launch: "Launch"


def require_plugins() -> Any:
    """The module `tensorrt.plugin`.

    Raises:
        FewstepError: TensorRT is missing, or has no plugins that are compiled ahead of time; or Triton is missing.
    """
    library = tensorrt()
    if library.__name__ == "tensorrt_rtx":
        raise FewstepError(
            "TensorRT for RTX takes no plugins: pip install tensorrt (10.9 or newer), or leave --kernels out"
        )
    if not hasattr(library, "QuickPluginCreationRequest"):
        raise FewstepError(
            f"tensorrt {library.__version__} has no plugins that are compiled ahead of time: "
            "install 10.9 or newer, or leave --kernels out"
        )
    if not HAS_TRITON:
        raise FewstepError(
            "triton is not installed, which compiles the plugins: pip install triton, or leave --kernels out"
        )
    return require("tensorrt.plugin", "tensorrt")


def with_plugins(model: Any, capability: int) -> Any:
    """Give the nodes that are our kernels to plugins, which TensorRT knows from then on.

    Args:
        model: an `onnx.ModelProto` with functions; see `nodes`. It stays as it is.
        capability: of the GPU that the engine is for, such as 90.

    Returns:
        A model without functions: calls that are no single launch are written out.

    Raises:
        FewstepError: see `require_plugins`.
    """
    module = require_plugins()
    placed, plugins = place(model)
    for plugin in plugins.values():
        register(module, plugin, capability)
    return placed


def place(model: Any) -> tuple[Any, dict[str, Plugin]]:
    """A copy of a model with plugins' nodes for calls of our kernels, and those plugins by name."""
    placed = type(model)()
    placed.CopyFrom(model)
    functions = {function.name: function for function in model.functions}
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    plugins: dict[str, Plugin] = {}
    for node in placed.graph.node:
        if node.domain == DOMAIN and (plugin := _plugin(node, functions[node.op_type], constants)):
            plugins[plugin.name] = plugin
            _hand_over(node, plugin)
    called = {node.op_type for node in placed.graph.node if node.domain == DOMAIN}
    left = [function for function in placed.functions if function.name in called]
    del placed.functions[:]
    placed.functions.extend(left)
    for plugin in plugins.values():
        _declare(plugin)
    return inlined(placed), plugins


def _plugin(node: Any, function: Any, constants: Mapping[str, tuple[int, ...]]) -> Plugin | None:
    """What a node becomes; None if it takes more than a launch."""
    from onnx import helper

    from ..kernels.plugins_triton import launch

    operator = node.op_type.rpartition("_")[0]
    declared = {value.name: _shape(value) for value in function.value_info}
    shapes = {
        parameter: constants.get(name, declared[parameter])
        for parameter, name in zip(function.input, node.input, strict=True)
    }
    values = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    values = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
    found = launch(operator, shapes, values)
    if found is None:
        return None
    halved = values["dim"] % len(shapes["x"]) if operator == "gated_linear_unit" else None
    likes = (0, 1) if operator == "norm_rotary" else (0,) * len(node.output)
    content = (operator, tuple(shapes), halved, sorted(found.constants.items(), key=str), found.counts, found.programs)
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:8]
    return Plugin(f"{operator}_{digest}", tuple(shapes), likes, halved, found)


def _shape(value: Any) -> "Shape":
    return tuple(size.dim_value or None for size in value.type.tensor_type.shape.dim)


def _hand_over(node: Any, plugin: Plugin) -> None:
    """Make a node what TensorRT's parser looks for a plugin for: one of its name, in its namespace, of its version."""
    from onnx import helper

    node.op_type = plugin.name
    del node.attribute[:]
    node.attribute.extend(
        helper.make_attribute(name, value) for name, value in (("plugin_namespace", DOMAIN), ("plugin_version", "1"))
    )


def _declare(plugin: Plugin) -> None:
    """Tell ONNX, and so `precision.to_half`, that all tensors of a plugin have one type."""
    from onnx import defs

    if defs.has(plugin.name, DOMAIN):
        return
    formal = defs.OpSchema.FormalParameter
    text = defs.OpSchema.AttrType.STRING
    schema = defs.OpSchema(
        plugin.name,
        DOMAIN,
        1,
        inputs=[formal(name, "T") for name in plugin.inputs],
        outputs=[formal(f"y_{place}", "T") for place in range(len(plugin.likes))],
        type_constraints=[("T", [f"tensor({each})" for each in ("float", "float16", "bfloat16")], "")],
        attributes=[defs.OpSchema.Attribute(name, text, "") for name in ("plugin_namespace", "plugin_version")],
    )
    defs.register_schema(schema)


def register(module: Any, plugin: Plugin, capability: int) -> None:
    """Make TensorRT know a plugin, unless it does.

    Args:
        module: `tensorrt.plugin`.
        plugin: what it is to know.
        capability: of the GPU that its kernel is compiled for.
    """
    if hasattr(getattr(module.op, DOMAIN, None), plugin.name):
        return

    def describe(*inputs: Any) -> Any:
        results = tuple(inputs[place].like() for place in plugin.likes)
        if plugin.halved is not None:
            results[0].shape_expr[plugin.halved] = inputs[0].shape_expr[plugin.halved] // 2
        return results

    def build(*given: Any) -> Any:
        *inputs, outputs, _ = given
        types = [TYPES[tensor.dtype.name] for tensor in (*inputs, *outputs)]
        program = assemble(plugin.launch.configuration(plugin.name, types), capability)
        batch = inputs[0].shape_expr[0]
        launch = module.KernelLaunchParams(
            grid_x=plugin.launch.grid(batch, module.cdiv), block_x=program.threads, shared_mem=program.shared_bytes
        )
        numbers = plugin.launch.numbers(batch)
        extra = module.SymIntExprs(len(numbers))
        for place, number in enumerate(numbers):
            extra[place] = module.SymInt32(number)
        return program.name, program.ptx, launch, extra

    # TensorRT reads tensors, their order and the number of results off a function's signature.
    tensor, text = module.TensorDesc, str | bytes
    results = GenericAlias(tuple, (tensor,) * len(plugin.likes))
    made = GenericAlias(tuple, (text, text, module.KernelLaunchParams, module.SymIntExprs))
    describe.__signature__ = _signature(plugin.inputs, tensor, results)  # type: ignore[attr-defined]
    build.__signature__ = _signature((*plugin.inputs, "outputs", "tactic"), inspect.Parameter.empty, made)  # type: ignore[attr-defined]
    module.register(f"{DOMAIN}::{plugin.name}")(describe)
    module.aot_impl(f"{DOMAIN}::{plugin.name}")(build)


def _signature(names: tuple[str, ...], kind: Any, result: Any) -> inspect.Signature:
    ordinary = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, ordinary, annotation=kind) for name in names]
    return inspect.Signature(parameters, return_annotation=result)
