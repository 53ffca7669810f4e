"""Attention's kernels as autograd sees them, in either direction; imported on CUDA only."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .attention_gradients_triton import launch_gradients
from .attention_triton import launch


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, lengths: Tensor | None
) -> Tensor:
    """`attention`; if the tensors carry tangents, so does the output, and one kernel computes both."""
    duals = [forward_ad.unpack_dual(tensor) for tensor in (query, key, value)]  # type: ignore[no-untyped-call]
    # Torch's symbolic zeros have no memory that a kernel could read.
    tangents = [None if d is None or d._is_zerotensor() else d for _, d in duals]
    out: Tensor
    out, d_out, _ = Attention.apply(*(primal for primal, _ in duals), *tangents, causal, scale, lengths)  # type: ignore[no-untyped-call]
    if d_out is not None:
        out = forward_ad.make_dual(out, d_out)  # type: ignore[no-untyped-call]
    return out


def attend_with_tangent(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`attention_with_tangent`, all arguments given."""
    out, d_out, _ = Attention.apply(*arguments)  # type: ignore[no-untyped-call]
    return out, torch.zeros_like(out) if d_out is None else d_out


class Attention(torch.autograd.Function):
    """Output, tangent (None if every tangent is) and base-2 logarithm of each row's sum of exponentials."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """See `launch`."""
        return launch(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor]) -> None:
        """Keep what `launch_gradients` takes."""
        query, key, value, _, _, _, ctx.causal, ctx.scale, lengths = inputs
        out, _, log_sum = output
        ctx.save_for_backward(query, key, value, out, log_sum, lengths)
        ctx.mark_non_differentiable(log_sum)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, tangent_gradient: Tensor | None, _: None) -> tuple[Any, ...]:
        """Gradients of query, key and value."""
        if tangent_gradient is not None:
            raise NotImplementedError("the tangent of attention has no gradient: detach it, as sCM and MeanFlow do")
        if gradient is None:
            return (None,) * 9
        gradients = Gradients.apply(gradient, *ctx.saved_tensors, ctx.causal, ctx.scale)  # type: ignore[no-untyped-call]
        return *gradients, *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        """Reached only where a gradient is taken first: `attend` sees to every other tangent."""
        raise NotImplementedError("attention's gradient has no tangent: take the tangent first, then the gradient")


class Gradients(torch.autograd.Function):
    """What `Attention.backward` computes; a function of its own, so that `torch.func.grad` can call it."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `launch_gradients`."""
        return launch_gradients(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        """Attention is differentiated once."""
        raise NotImplementedError("attention has no second derivative: use attention_reference where one is needed")
