"""The operators that compilers and exporters see: what they declare is true, and networks keep them in one graph."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import kernels
from fewstep.kernels import dispatch, operators

from .networks import Family, autoencoder, build, flux, run, sana, sana_sprint, unet

pytestmark = pytest.mark.usefixtures("slow_convolutions")

Arguments = tuple[Any, ...]
OPERATORS = {
    name: value
    for name, value in vars(operators).items()
    if inspect.isfunction(value) and hasattr(value, "__wrapped__")
}


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def vectors(count: int, *shape: int) -> list[Tensor]:
    return list(torch.randn(count, *shape))


def halves(*shape: int) -> tuple[Tensor, ...]:
    """Of a wider tensor, as layers get scale and shift."""
    return torch.randn(*shape[:-1], 2 * shape[-1]).chunk(2, dim=-1)


def heads(batch: int, length: int, count: int, width: int) -> Tensor:
    """A view of a fused projection."""
    return torch.randn(batch, length, 2 * count * width).chunk(2, dim=-1)[1].unflatten(-1, (count, width))


CASES: dict[str, Callable[[], Arguments]] = {
    "adaptive_norm": lambda: (torch.randn(2, 3, 8), *halves(2, 8), *vectors(2, 8)),
    "adaptive_norm, rms": lambda: (torch.randn(2, 8, 3).mT, None, torch.randn(2, 3, 8), None, None, 1e-3, "rms"),
    "gated_residual": lambda: (*vectors(2, 2, 3, 8), torch.randn(2, 1, 8)),
    "gated_residual, strides": lambda: (*torch.randn(2, 2, 8, 3).mT, torch.randn(2, 3, 8)),
    "gated_residual_norm": lambda: (*vectors(2, 2, 3, 8), *vectors(3, 2, 8), *vectors(2, 8)),
    "gated_residual_norm, no gate": lambda: (torch.randn(2, 8, 3).mT, torch.randn(2, 3, 8)),
    "norm_rotary": lambda: (heads(2, 3, 2, 4), heads(2, 3, 1, 4), *vectors(2, 4), *vectors(2, 3, 4)),
    "norm_rotary, no rotation": lambda: (heads(1, 3, 2, 5), heads(1, 4, 2, 5), *vectors(2, 5), None, None),
    "gated_linear_unit": lambda: (torch.randn(2, 3, 8),),
    "gated_linear_unit, channels last": lambda: (channels_last(2, 6, 3, 4), "silu", 1),
    "gated_linear_unit, strides": lambda: (torch.randn(2, 3, 9)[..., :8], "gelu_tanh"),
    "group_norm_silu": lambda: (torch.randn(2, 8, 3, 4), 4, *vectors(2, 8)),
    "group_norm_silu, channels last": lambda: (channels_last(2, 8, 3, 4), 2, None, None, 1e-3, *halves(2, 8), False),
    "group_norm_silu, strides": lambda: (torch.randn(2, 8, 4, 3).mT, 4),
    "timestep_embedding": lambda: (
        torch.rand(3),
        6,
        torch.randn(5, 6),
        *vectors(1, 5),
        torch.randn(4, 5),
        *vectors(1, 4),
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def operands(case: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, Arguments]:
    """An operator, and arguments that all need gradients."""
    values = CASES[case]()
    leaves = [
        value.to(device, dtype).detach().requires_grad_() if isinstance(value, Tensor) else value for value in values
    ]
    return getattr(torch.ops.fewstep, case.split(",")[0]).default, tuple(leaves)


def test_every_operator_is_tested() -> None:
    assert OPERATORS.keys() == {case.split(",")[0] for case in CASES}


@every_case
def test_declarations_hold_of_the_reference(case: str) -> None:
    torch.library.opcheck(*operands(case, torch.float32))


@every_case
def test_declarations_hold_of_the_kernels(case: str, interpreted: None, triton_device: str) -> None:
    torch.library.opcheck(*operands(case, torch.float32, triton_device))


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fake_results_are_like_those_of_half_precision(
    case: str, dtype: torch.dtype, interpreted: None, triton_device: str
) -> None:
    node, arguments = operands(case, dtype, triton_device)
    torch.library.opcheck(node, arguments, test_utils=("test_schema", "test_faketensor"))


@every_case
def test_results_and_gradients_are_those_of_the_operation(case: str, interpreted: None, triton_device: str) -> None:
    node, arguments = operands(case, torch.float32, triton_device)
    leaves = [value for value in arguments if isinstance(value, Tensor)]

    def computed(call: Callable[..., Any]) -> list[Tensor]:
        results = call(*arguments)
        results = [results] if isinstance(results, Tensor) else list(results)
        weights = [torch.linspace(-1, 2, result.numel()).view(result.shape).to(result) for result in results]
        return results + list(torch.autograd.grad(results, leaves, weights, materialize_grads=True))

    function = OPERATORS[case.split(",")[0]]
    for found, expected in zip(computed(node), computed(function), strict=True):
        assert found.dtype == expected.dtype
        tolerance = 1e-5 if "timestep" in case else 0  # there autograd is given the reference, not the kernel
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class Seen(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operator.name())
        return operator(*args, **kwargs or {})


def test_nothing_goes_through_an_operator_unless_a_graph_is_traced() -> None:
    x = torch.randn(2, 8)
    with Seen() as seen:
        OPERATORS["gated_linear_unit"](x)
    assert seen.names
    assert not any(name.startswith("fewstep") for name in seen.names)


class Graphs:
    """A backend of `torch.compile` that keeps the graphs that it gets, forward and backward."""

    def __init__(self) -> None:
        from torch._dynamo.backends.common import aot_autograd

        self.forward: list[Counter[str]] = []
        self.backward: list[Counter[str]] = []
        self.backend = aot_autograd(fw_compiler=self._keeper(self.forward), bw_compiler=self._keeper(self.backward))

    def _keeper(self, kept: list[Counter[str]]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func

        def keep(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            kept.append(nodes(graph))
            return make_boxed_func(graph.forward)

        return keep


def nodes(graph: torch.fx.GraphModule) -> Counter[str]:
    """How often each of our operators is called."""
    names = (str(node.target) for node in graph.graph.nodes)
    return Counter(name.split(".")[1] for name in names if name.startswith("fewstep."))


@pytest.fixture
def fused() -> Iterator[None]:
    torch.compiler.reset()
    with dispatch.fused_everywhere():
        yield
    torch.compiler.reset()


def derivatives(network: nn.Module, call: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    """Output, and the gradients of all parameters."""
    output: Tensor = call(**arguments, return_dict=False)[0]
    weights = torch.linspace(-1, 2, output.numel()).view(output.shape).to(output)
    return [output.detach(), *torch.autograd.grad(output, list(network.parameters()), weights, materialize_grads=True)]


@pytest.mark.parametrize("family", [flux, sana_sprint])
def test_compiled_network_keeps_its_operators_in_one_graph_each_way(family: Family, fused: None) -> None:
    network, arguments = build(family)
    counts = kernels.apply(network)
    counts.pop("timestep_embedding", None)  # is fused without gradients only
    graphs = Graphs()
    compiled = torch.compile(network, backend=graphs.backend, fullgraph=True)
    expected, found = (derivatives(network, call, arguments) for call in (network, compiled))
    assert graphs.forward == [counts]
    assert graphs.backward == [{f"{name}_backward": count for name, count in counts.items()}]
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=0, atol=1e-5 * max(float(reference.abs().max()), 1e-2))


def test_compiled_network_runs_the_kernels(fused: None, interpreted: None, triton_device: str) -> None:
    network, arguments = build(sana)
    network.to(triton_device)
    arguments = {name: value.to(triton_device) for name, value in arguments.items()}
    expected = derivatives(network, network, arguments)
    kernels.apply(network)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for value, reference in zip(derivatives(network, compiled, arguments), expected, strict=True):
        # As in test_patch: kernels sum in another order, and gradients cancel.
        torch.testing.assert_close(value, reference, rtol=0, atol=5e-4 * max(float(reference.abs().max()), 1e-3))


def test_other_batch_sizes_are_no_new_graph(fused: None) -> None:
    network, arguments = build(sana_sprint)
    counts = kernels.apply(network)
    graphs = Graphs()
    compiled = torch.compile(network, backend=graphs.backend, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            sized = {name: value[:1].expand(batch, *value.shape[1:]).contiguous() for name, value in arguments.items()}
            for value in sized.values():
                torch._dynamo.mark_dynamic(value, 0)  # an error where tracing makes it a constant
            torch.testing.assert_close(compiled(**sized, return_dict=False)[0], run(network, sized), rtol=0, atol=1e-5)
    assert graphs.forward == [counts]


def test_on_a_cpu_plain_torch_is_compiled() -> None:
    network, arguments = build(sana_sprint)
    kernels.apply(network)
    torch.compiler.reset()
    graphs = Graphs()
    with torch.no_grad():
        compiled = torch.compile(network, backend=graphs.backend, fullgraph=True)
        torch.testing.assert_close(compiled(**arguments, return_dict=False)[0], run(network, arguments))
    assert graphs.forward == [{}]
    torch.compiler.reset()


@pytest.mark.parametrize("family", [autoencoder, sana_sprint])
def test_exported_program_has_one_node_a_kernel_until_removal(family: Family, fused: None) -> None:
    network, arguments = build(family)
    counts = kernels.apply(network)
    with torch.no_grad():
        expected = run(network, arguments)
        program = torch.export.export(network, (), {**arguments, "return_dict": False})
        assert nodes(program.graph_module) == counts
        torch.testing.assert_close(program.module()(**arguments, return_dict=False)[0], expected)
        kernels.remove(network)
        program = torch.export.export(network, (), {**arguments, "return_dict": False})
    assert nodes(program.graph_module) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("family", [unet, flux, sana])
def test_compiled_for_a_gpu_network_computes_the_same(family: Family, mode: str) -> None:
    """The second call captures a CUDA graph, the third replays it."""
    network, arguments = build(family)
    network.to("cuda", memory_format=torch.channels_last if family is unet else torch.contiguous_format)
    arguments = {name: value.to("cuda") for name, value in arguments.items()}
    with torch.no_grad():
        expected = run(network, arguments)
        kernels.apply(network)
        torch.compiler.reset()
        compiled = torch.compile(network, mode=mode, fullgraph=True)
        for _ in range(3):
            output = compiled(**arguments, return_dict=False)[0]
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    torch.compiler.reset()
