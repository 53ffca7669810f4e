"""The operations of patched layers as operators of torch, `torch.ops.fewstep.*`: what compilers and exporters see.

While `torch.compile` or `torch.export` traces, a call is one node of the graph; else the operation is called directly.
Operators are opaque (Triton's `wrap_triton` is not used): launches depend on sizes, which tracing would make constants.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, get_origin

import torch
from torch import Tensor
from torch.library import infer_schema

from . import adaptive_norm as norms
from . import gated_linear_unit as units
from . import group_norm as groups
from . import rotary
from . import timestep_embedding as embeddings

P = ParamSpec("P")
R = TypeVar("R")
Arrange = Callable[[Tensor, Tensor], Tensor]


def operator(function: Callable[P, R], reference: Callable[..., Any], arrange: Arrange) -> Callable[P, R]:
    """Register `fewstep::<name>` and its backward.

    Args:
        function: the operation; its signature is the operator's, its result the operator's result on any device.
        reference: of the same arguments; of fake tensors, it says what shape and dtype the result has.
        arrange: puts a result into the memory layout that the kernel gives it, given the operation's first tensor.

    Returns:
        The function, which is a node where a graph is traced.
    """
    name, schema = f"fewstep::{function.__name__}", _schema(function)
    defaults = [parameter.default for parameter in inspect.signature(function).parameters.values()]

    def arranged(call: Callable[..., Any], values: Sequence[Any]) -> Any:
        results = call(*values, *defaults[len(values) :])  # torch leaves out what equals its default
        if isinstance(results, Tensor):
            return arrange(results, values[0])
        return tuple(arrange(result, values[0]) for result in results)

    def run(*values: Any) -> Any:
        return arranged(function, values)

    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, lambda *values: arranged(reference, values))
    _register_backward(name, schema, function)
    node = _overload(name)

    @wraps(function)
    def call(*values: P.args, **options: P.kwargs) -> R:
        result: R = node(*values, **options) if torch.compiler.is_compiling() else function(*values, **options)
        return result

    return call


def _schema(function: Callable[..., Any]) -> str:
    """Of an operator with a function's signature; one of several words is a string."""

    def prototype() -> None:
        """Carries the signature."""

    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=str) if get_origin(parameter.annotation) is Literal else parameter
        for parameter in signature.parameters.values()
    ]
    prototype.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return infer_schema(prototype, mutates_args=())


def _overload(name: str) -> Any:
    namespace, _, operation = name.partition("::")
    return getattr(getattr(torch.ops, namespace), operation).default


def _register_backward(name: str, schema: str, function: Callable[..., Any]) -> None:
    """Register `<name>_backward`: gradients of the tensors that need one, given all results' gradients.

    It calls the operation again and has autograd differentiate that: only the arguments are kept between the passes.
    """
    parameters = schema[: schema.index(" ->")].removeprefix("(")
    backward_name = f"{name}_backward"

    def run(gradients: list[Tensor], needed: list[bool], *values: Any) -> list[Tensor]:
        detached = [value.detach() if isinstance(value, Tensor) else value for value in values]
        leaves = [value.requires_grad_() for value, wanted in zip(detached, needed, strict=False) if wanted]
        with torch.enable_grad():
            results = function(*detached)
            found = torch.autograd.grad(results, leaves, gradients, materialize_grads=True)
        return _owned(found, leaves, gradients)

    def fake(gradients: list[Tensor], needed: list[bool], *values: Any) -> list[Tensor]:
        return [torch.empty_like(value) for value, wanted in zip(values, needed, strict=False) if wanted]

    torch.library.define(
        backward_name,
        f"(Tensor[] gradients, bool[] needed, {parameters} -> Tensor[]",
        tags=torch.Tag.pt2_compliant_tag,
    )
    torch.library.impl(backward_name, "default", run)
    torch.library.register_fake(backward_name, fake)
    node = _overload(backward_name)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.constants, strict=True)
        values = [constant if tensor is None else tensor for tensor, constant in pairs]
        found = iter(node(list(gradients), list(ctx.needs_input_grad), *values))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)

    torch.library.register_autograd(name, backward, setup_context=save)


def _owned(found: Sequence[Tensor], like: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Results that share memory neither with what was given nor with each other, laid out as `torch.empty_like`."""
    taken = {value.untyped_storage().data_ptr() for value in given}
    owned = []
    for value, pattern in zip(found, like, strict=True):
        strides = torch.empty_like(pattern, device="meta").stride()
        place = value.untyped_storage().data_ptr()
        if place in taken or value.stride() != strides:
            value = torch.empty_like(pattern).copy_(value)
        taken.add(place)
        owned.append(value)
    return owned


def _contiguous(result: Tensor, x: Tensor) -> Tensor:
    return result.contiguous()


def _channels_last_or_first(result: Tensor, x: Tensor) -> Tensor:
    """Channels last if those of x are, else contiguous."""
    if x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return result.contiguous()
    return result.movedim(1, -1).contiguous().movedim(-1, 1)


def _in_order(result: Tensor, x: Tensor) -> Tensor:
    """Dimensions in the order that those of x have in memory, if it is dense, else contiguous."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    if x.is_contiguous() or not x.permute(order).is_contiguous():
        return result.contiguous()
    return result.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])


adaptive_norm = operator(norms.adaptive_norm, norms.adaptive_norm_reference, _contiguous)
gated_residual = operator(norms.gated_residual, norms.gated_residual_reference, _contiguous)
gated_residual_norm = operator(norms.gated_residual_norm, norms.gated_residual_norm_reference, _contiguous)
norm_rotary = operator(rotary.norm_rotary, rotary.norm_rotary_reference, _contiguous)
gated_linear_unit = operator(units.gated_linear_unit, units.gated_linear_unit_reference, _in_order)
group_norm_silu = operator(groups.group_norm_silu, groups.group_norm_silu_reference, _channels_last_or_first)
timestep_embedding = operator(embeddings.timestep_embedding, embeddings.timestep_embedding_reference, _contiguous)
