"""One comparison: a kernel, its reference eager and compiled, and its rivals, forward and backward."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from .timing import Call, copy_of, median_seconds

# One forward pass serves many timed backward passes: its buffers must outlive the first.
torch._functorch.config.donated_buffer = False

Function = Callable[..., Any]
"""Of tensors and constants, to a tensor or a tuple of them."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How all cases are measured.

    Args:
        device: where; on a CPU the kernels are their references.
        dtype: of activations and weights, where a case does not need another.
        repeats: calls of which the median is taken.
        backend: of `torch.compile`; `aot_eager` needs no compiler.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 100
    backend: str = "inductor"

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def compile(self, function: Function) -> Function:
        """The function as `torch.compile` makes it for the shape of its first call."""
        compiled: Function = torch.compile(function, dynamic=False, backend=self.backend)
        return compiled


@dataclass(frozen=True)
class Variant:
    """One implementation.

    Args:
        function: what is called.
        inputs: its arguments.
        trained: positions of those that get gradients.
        share: of the case's `work` that it does.
    """

    function: Function
    inputs: tuple[Any, ...]
    trained: tuple[int, ...] = ()
    share: float = 1.0

    def forward(self) -> list[Tensor]:
        """What it returns, as a list."""
        return _listed(self.function(*self.inputs))

    def backward(self, slopes: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Its backward pass, from gradients of the results to those of the trained arguments."""
        arguments = list(self.inputs)
        for position in self.trained:
            arguments[position] = arguments[position].detach().clone().requires_grad_()
        results = _listed(self.function(*arguments))
        leaves = [arguments[position] for position in self.trained]
        return lambda: list(torch.autograd.grad(results, leaves, slopes, retain_graph=True))


@dataclass(frozen=True)
class Case:
    """An operation at one shape.

    Args:
        operation: its name.
        model: where the shape comes from.
        where: in that model, in words and sizes.
        kernel: the public function of `fewstep.kernels`.
        reference: its definition in torch.
        inputs: makes the arguments of both.
        trained: positions of the arguments that get gradients; none: there is no backward pass.
        rivals: other libraries' implementations, by name, made from the same arguments.
        work: floating-point operations of the forward pass, where these decide and not bytes.
        ceiling: the number format whose matrix rate bounds `work`.
        passed_on: leading arguments whose gradient is the result's own: the backward pass moves nothing for them.
    """

    operation: str
    model: str
    where: str
    kernel: Function
    reference: Function
    inputs: Callable[[Settings], tuple[Any, ...]]
    trained: tuple[int, ...] = ()
    rivals: Mapping[str, Callable[..., Variant]] = field(default_factory=dict)
    work: float = 0.0
    ceiling: str = "bf16"
    passed_on: int = 0

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.operation}, {self.model}, {self.where}"


def compare(case: Case, settings: Settings, ceilings: Mapping[str, float]) -> Iterator[Row]:
    """Measure the forward pass, then the backward pass if there is one.

    Args:
        case: what is measured.
        settings: how.
        ceilings: TFLOP/s of matrix products, by number format.

    Yields:
        Of each pass the median microseconds of every variant that runs, the GB/s or TFLOP/s that they make, the
        largest difference from the reference as a share of its largest number, and which fraction of the ceiling the
        kernel reaches: of the matrix rate, or of a copy of as many bytes as must move.
    """
    torch.compiler.reset()  # else it gives up after a few shapes
    torch.manual_seed(0)
    inputs = case.inputs(settings)
    others = {name: make(*inputs) for name, make in case.rivals.items()}
    others["compiled"] = Variant(settings.compile(case.reference), inputs, case.trained)
    variants = {
        "eager": Variant(case.reference, inputs, case.trained),
        "kernel": Variant(case.kernel, inputs, case.trained),
        **{name: variant for name, variant in others.items() if _runs(f"{case.name}: {name}", variant)},
    }
    forward = {name: variant.forward for name, variant in variants.items()}
    results = variants["eager"].forward()
    measure = partial(_row, case, variants, settings=settings, ceilings=ceilings)
    # Every argument is read once, every result written once.
    yield measure("forward", forward, _bytes(inputs) + _bytes(results))
    if not case.trained:
        return
    slopes = [torch.randn_like(result) for result in results]
    backward = {name: variant.backward(slopes) for name, variant in variants.items() if variant.trained}
    gradients = [inputs[position] for position in case.trained]
    # The results' gradients and the arguments are read once, the arguments' gradients written once.
    traffic = _bytes(slopes) + _bytes(inputs) + _bytes(gradients) - 2 * _bytes(inputs[: case.passed_on])
    yield measure("backward", backward, traffic)


def _runs(name: str, variant: Variant) -> bool:
    """Whether somebody else's implementation can do this shape: the kernel is measured without it, too."""
    try:
        results = variant.forward()
        if variant.trained:
            variant.backward(results)()
    except Exception as error:
        print(f"{name} fails: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _row(
    case: Case,
    variants: Mapping[str, Variant],
    direction: str,
    passes: Mapping[str, Callable[[], list[Tensor]]],
    traffic: int,
    settings: Settings,
    ceilings: Mapping[str, float],
) -> Row:
    """What `compare` yields of one direction."""
    expected = passes["eager"]()
    differences = {name: _difference(run(), expected) for name, run in passes.items() if name != "eager"}
    calls: dict[str, Call] = dict(passes)
    if not case.work:
        calls["copy"] = copy_of(traffic, settings.device)
    seconds = {name: median_seconds(call, settings.device, settings.repeats) for name, call in calls.items()}
    row: Row = {"operation": case.operation, "model": case.model, "where": case.where, "pass": direction}
    row["microseconds"] = {name: round(1e6 * value, 2) for name, value in seconds.items()}
    if case.work:
        # Attention computes five products backward for its two forward.
        work = case.work * (2.5 if direction == "backward" else 1.0)
        rates = {name: variants[name].share * work / value / 1e12 for name, value in seconds.items()}
        row["teraflops"] = {name: round(rate, 3) for name, rate in rates.items()}
        best = work / ceilings[case.ceiling] / 1e12
    else:
        row["gigabytes_per_second"] = {name: round(traffic / value / 1e9, 1) for name, value in seconds.items()}
        best = seconds["copy"]
    return {**row, "largest_difference": differences, "fraction_of_ceiling": round(best / seconds["kernel"], 3)}


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """The largest, as a share of the largest number of each result; None for results of another form."""
    if [each.shape for each in found] != [each.shape for each in expected]:
        return None
    shares = [
        (one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-30)
        for one, other in zip(found, expected, strict=True)
    ]
    return float(f"{float(torch.stack(shares).max()):.3g}")


def _listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _bytes(values: Sequence[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
