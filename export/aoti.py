"""The AOTInductor target: the torch program compiled ahead of time, in C++ for a CPU and in Triton for a GPU."""

import json
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime.engines import PRECISIONS
from ..runtime.engines.aoti import INPUTS, OUTPUTS, SUFFIX
from ..runtime.engines.device import computes_bf16
from ..runtime.engines.torch import require_compiler
from .graph import BATCH, Graph, quiet
from .precision import sensitive

_ATEN = torch.ops.aten
LAYERS = {
    _ATEN.linear.default,
    _ATEN.conv2d.default,
    _ATEN.conv_transpose2d.input,
    _ATEN.matmul.default,
    _ATEN.bmm.default,
    _ATEN.scaled_dot_product_attention.default,
}
"""What bfloat16 makes faster; the compiler fuses all other operators, and rounding between them would gain nothing."""


def precisions() -> tuple[str, ...]:
    """What this target is built in on this machine, the default first.

    Raises:
        FewstepError: there is no C++ compiler.
    """
    require_compiler("aoti")
    has_bf16 = torch.cuda.is_available() or computes_bf16()
    return PRECISIONS["aoti"] if has_bf16 else ("fp32",)


def write(graph: Graph, folder: Path, name: str, precision: str) -> dict[str, int] | None:
    """Write the file that the aoti engine loads, for this processor or, where there is one, for this GPU.

    Args:
        graph: what to compile.
        folder: where to.
        name: of the file, without its suffix.
        precision: one of `precisions()`.

    Returns:
        How many operators bf16 leaves in float32, by rule; see `precision.sensitive`.

    Raises:
        FewstepError: there is no C++ compiler.
    """
    require_compiler("aoti")
    module, kept = program_of(graph, precision)
    example = tuple(graph.example[name] for name in graph.inputs)
    settings = {
        "aot_inductor.metadata": {INPUTS: json.dumps(graph.inputs), OUTPUTS: json.dumps(graph.outputs)},
        "cpp.dynamic_threads": True,  # as many as whoever runs it sets, not as whoever compiles it
        "freezing": True,  # weights laid out beforehand as the products want them
    }
    with quiet(), torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=({0: BATCH},) * len(example))
        if torch.cuda.is_available():
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, "cuda")
        path = str(folder / f"{name}{SUFFIX}")
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=settings)
    return kept


def program_of(graph: Graph, precision: str) -> tuple[fx.GraphModule, dict[str, int] | None]:
    """What is compiled: a function of the graph's inputs, in their order, that gives a tuple of its outputs.

    Args:
        graph: of a whole program or a part of one.
        precision: one of `precisions()`.

    Returns:
        The function, and how many operators bf16 leaves in float32, by rule.
    """
    module = _module(graph)
    return module, _to_bf16(module, graph.model.graph) if precision == "bf16" else None


def _module(graph: Graph) -> fx.GraphModule:
    """Torch's program, cut down to what the graph takes and gives."""
    module = graph.program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    nodes = {node.name: node for node in module.graph.nodes}
    results: Any = module.graph.output_node().args[0]
    (result,) = results
    module.graph.output_node().args = (tuple(nodes.get(name, result) for name in graph.outputs),)
    module.graph.eliminate_dead_code()
    placeholders = dict(zip(graph.example, module.graph.find_nodes(op="placeholder"), strict=True))
    present = placeholders[graph.inputs[0]]
    for absent in set(placeholders) - set(graph.inputs):
        for user in list(placeholders[absent].users):  # which asks for the batch size, the same of every input
            user.replace_input_with(placeholders[absent], present)
        module.graph.erase_node(placeholders[absent])
    return fx.GraphModule(module, _plain(module.graph))


def _plain(graph: fx.Graph) -> fx.Graph:
    """The graph as a function of tensors that gives a tuple of them, whatever its caller passed and expected."""
    graph.set_codegen(fx.graph.CodeGen())
    return graph


def _to_bf16(module: fx.GraphModule, graph: Any) -> dict[str, int]:
    """Let the layers of a module compute in bfloat16, but for those that ONNX computed beforehand or a rule keeps."""
    from onnx import TensorProto

    kept = sensitive(graph, TensorProto.BFLOAT16)
    half = {name for node in graph.node for name in node.output}.difference(*kept.values())
    for node in list(module.graph.nodes):
        if node.target in LAYERS and node.name in half:
            _cast(module, node)
    module.recompile()
    return {rule: len(names) for rule, names in kept.items() if names}


def _cast(module: fx.GraphModule, node: fx.Node) -> None:
    """Give an operator its float operands in bfloat16, and its users the result in float32."""
    convert = torch.ops.aten.to.dtype
    with module.graph.inserting_before(node):
        for operand in node.all_input_nodes:
            if _is_float(module, operand):
                half = module.graph.call_function(convert, (operand, torch.bfloat16))
                node.replace_input_with(operand, half)
    with module.graph.inserting_after(node):
        single = module.graph.call_function(convert, (node, torch.float32))
    single.meta = dict(node.meta)
    node.replace_all_uses_with(single, delete_user_cb=lambda user: user is not single)


def _is_float(module: fx.GraphModule, node: fx.Node) -> bool:
    value = attrgetter(str(node.target))(module) if node.op == "get_attr" else node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32
